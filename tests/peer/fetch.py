"""
Download the test suite of the installed transformers from its source distribution: `python tests/peer/fetch.py DIR`.

Its package is called `tests`, like ours, and is renamed to `transformers_tests`. Imported modules that the archive
lacks are stubbed: two mixins that do not apply to RefTR (exporters, text generation), the values that its
configuration test sets, and its store of downloads.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


STUBS = {
    "transformers_tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "transformers_tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "transformers_tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False, "output_hidden_states": True, "output_attentions": False, "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5, "architectures": ["BertModel"], "id2label": {0: "label"},\n'
        '    "label2id": {"label": "0"}, "problem_type": "regression",\n'
        "}\n"
    ),
    "fetch_hub_objects_for_ci.py": "def url_to_local_path(url, return_url_if_not_found=True):\n    return url\n",
}


def main(folder: Path):
    version = importlib.metadata.version("transformers")
    marker = folder / version
    if marker.exists():
        return
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", download, f"transformers=={version}"], check=True)
        (archive,) = Path(download).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as source:
            top = f"{archive.name.removesuffix('.tar.gz')}/tests"
            for member in source.getmembers():
                name = Path(member.name)
                if name.parent.as_posix() == top and name.suffix == ".py":
                    path = folder / "transformers_tests" / name.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(source.extractfile(member).read())
    for name, text in {"transformers_tests/__init__.py": "", **STUBS}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.parent != folder:
            (path.parent / "__init__.py").touch()
    marker.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

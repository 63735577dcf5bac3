"""
Fetch the model test-suite of the installed transformers from its source distribution: `python tests/peer/fetch.py DIR`.

Its package is called `tests`, like ours; here it becomes `transformers_tests`. What it imports and the archive lacks is
stubbed: two mixins that do not apply to RefTR (exporters, text generation), and the values that its configuration test
sets.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        '    "return_dict": False, "output_hidden_states": True, "output_attentions": False, "dtype": "float16",\n'
        '    "chunk_size_feed_forward": 5, "architectures": ["BertModel"], "id2label": {0: "label"},\n'
        '    "label2id": {"label": "0"}, "problem_type": "regression",\n'
        "}\n"
    ),
}


def main(folder: Path):
    version = importlib.metadata.version("transformers")
    package = folder / "transformers_tests"
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
                place = Path(member.name)
                if place.parent.as_posix() == top and place.suffix == ".py":
                    path = package / place.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(source.extractfile(member).read())
    for name, text in {"__init__.py": "", **STUBS}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    marker.touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

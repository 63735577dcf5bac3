"""Objects for the cutouts builder in miniature: one PNG file per object, or per view of it."""

from pathlib import Path

from PIL import Image, ImageDraw


# file -> color and shape; three objects are of one channel each, which tells their pixels apart
OBJECTS = {
    "apple": ((255, 0, 0), "disc"),
    "leaf": ((0, 255, 0), "triangle"),
    "car": ((0, 0, 255), "bar"),
    "mug-1": ((230, 200, 20), "disc"),
    "mug-2": ((230, 200, 20), "bar"),
    "red_mug": ((240, 80, 80), "bar"),
    "cup": ((240, 240, 240), "triangle"),
    "large_cup": ((20, 20, 20), "triangle"),
}


def draw_object(color: tuple, shape: str, side: int = 64) -> Image.Image:
    """Draw a shape on transparent pixels."""
    image = Image.new("RGBA", (4 * side, 4 * side), (*color, 0))
    draw = ImageDraw.Draw(image)
    near, far = 0.4 * side, 3.6 * side
    if shape == "disc":
        draw.ellipse([near, near, far, far], fill=(*color, 255))
    elif shape == "bar":
        draw.rectangle([near, 1.2 * side, far, 2.8 * side], fill=(*color, 255))
    else:
        draw.polygon([(2 * side, near), (far, far), (near, far)], fill=(*color, 255))
    return image.reduce(4)


def make_cutouts(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (color, shape) in OBJECTS.items():
        draw_object(color, shape).save(folder / f"{name}.png")

"""Matplotlib without its drawing, which takes longer than a training run of the tests."""

from pathlib import Path
from unittest.mock import Mock

import numpy
from PIL import Image

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'


class BlankFigure(Mock):
    """In place of `matplotlib.figure.Figure`: it takes every curve, and its picture is empty."""

    def subplots(self, rows: int = 1, columns: int = 1, squeeze: bool = True) -> numpy.ndarray:
        assert not squeeze
        return numpy.array([Mock() for _ in range(rows * columns)], dtype=object).reshape(rows, columns)

    def savefig(self, target, format=None, **options) -> None:
        """Writes SVG text into a stream, or a PNG or SVG file."""
        if hasattr(target, "write"):
            assert format == "svg"
            target.write(SVG)
        elif (format or Path(target).suffix[1:]) == "svg":
            Path(target).write_text(SVG)
        else:
            Image.new("RGB", (8, 8), "white").save(target, "PNG")

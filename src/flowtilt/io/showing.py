"""Images that a notebook shows, and that one call writes to a file."""

import sys
from abc import ABC, abstractmethod
from io import BytesIO
from pathlib import Path

from PIL import Image as Picture

from flowtilt.io.files import write_atomic


class Showable(ABC):
    """Something with a picture. As the last line of a notebook's cell it is displayed."""

    @abstractmethod
    def picture(self) -> Picture.Image:
        """All images as one; small ones are enlarged."""

    def png(self) -> bytes:
        """`picture()` as a PNG file."""
        buffer = BytesIO()
        self.picture().save(buffer, "PNG", optimize=True)
        return buffer.getvalue()

    def save(self, path: str | Path) -> None:
        """Writes `png()` to a file."""
        write_atomic(Path(path), self.png())

    def show(self) -> None:
        """Shows the images in a notebook; elsewhere in the system's viewer."""
        shell = sys.modules.get("IPython")  # imported in every notebook
        if shell is not None and shell.get_ipython() is not None:
            shell.display.display(shell.display.Image(self.png()))
        else:
            self.picture().show()

    def _repr_png_(self) -> bytes:
        return self.png()

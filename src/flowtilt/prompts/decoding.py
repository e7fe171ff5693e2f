"""From a file's bytes to text that holds nothing invisible, or to one line that says what the file is instead."""

import codecs
import re

from flowtilt.errors import UserError

AS_TEXT = "save it as CSV, JSON lines or text"
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip-compressed; unpack it with gunzip"),
    (b"BZh9", "bzip2-compressed; unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "xz-compressed; unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it with unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive; unpack it"),
    (b"PAR1", "a Parquet file; pandas.read_parquet(file).to_json('prompts.jsonl', orient='records', lines=True) writes JSON lines"),
    (b"ARROW1", f"an Arrow file; {AS_TEXT}"),
    (b"\xff\xff\xff\xff", f"an Arrow stream; {AS_TEXT}"),
    (b"PK\x03\x04", f"a zip archive or an Excel workbook; unpack it, or {AS_TEXT}"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"an old Office document; {AS_TEXT}"),
    (b"SQLite format 3\x00", f"an SQLite database; {AS_TEXT}"),
    (b"\x89HDF\r\n", f"an HDF5 file; {AS_TEXT}"),
    (b"\x93NUMPY", f"a NumPy array; {AS_TEXT}"),
    (b"%PDF-", f"a PDF; {AS_TEXT}"),
    (b"{\\rtf", f"a rich-text document; {AS_TEXT}"),
    (b"\x89PNG", "an image; give a file of captions"),
    (b"\xff\xd8\xff", "an image; give a file of captions"),
    (b"GIF8", "an image; give a file of captions"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    (b"<!doctype html", "an HTML page; download the raw file"),
    (b"<html", "an HTML page; download the raw file"),
)
"""How a file that holds no text, or not the text that is meant, begins; what it is and what to do."""

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_JOINERS = "\u200c\u200d"
_INVISIBLE = re.compile(
    # white space among the control characters stays
    r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    # Persian, Indic scripts and emoji need joiners between their own characters
    rf"|(?<![^\x00-\x7f])[{_JOINERS}]+|[{_JOINERS}]+(?![^\x00-\x7f{_JOINERS}])"
)


def decode(data: bytes, path: str, what: str = "prompts") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; line ends are "\\n".

    Args:
        what: the file is of, for messages.

    Raises:
        UserError: it is another kind of file, or in another encoding; says which, and in which line.
    """
    mark, encoding = next(((mark, encoding) for mark, encoding in MARKS if data.startswith(mark)), (b"", "utf-8"))
    if not mark:
        head = data[:64]
        for signature, other in SIGNATURES:
            if head.startswith(signature) or (signature.startswith(b"<") and head.lower().startswith(signature)):
                raise UserError(f"{what} {path}: this is {other}")
        if wide := _without_mark(data):
            raise UserError(f"{what} {path}: looks like {wide} without a byte order mark; save the file as UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        start = error.start + len(mark)
        line = 1 + data.count(b"\n", 0, start)
        hint = "it may be Windows-1252 or Latin-1; " if encoding == "utf-8" else ""
        raise UserError(f"{what} {path}:{line}: byte {start} is not {encoding.upper()}; {hint}save the file as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _without_mark(data: bytes) -> str:
    """The UTF-16 whose every second byte is NUL, as of Western text; "" for anything else."""
    head = data[: 2 * (min(len(data), 200) // 2)]
    if len(head) < 4:
        return ""
    low, high = head[::2], head[1::2]
    if high.count(0) > 0.7 * len(high) and low.count(0) < 0.1 * len(low):
        return "UTF-16 (little endian)"
    return "UTF-16 (big endian)" if low.count(0) > 0.7 * len(low) and high.count(0) < 0.1 * len(high) else ""


def visible(text: str) -> str:
    """Text without NUL and other control characters, zero-width spaces, byte order marks, soft hyphens and direction marks.

    Tabs and line ends stay; so do zero-width joiners between two characters beyond ASCII.
    """
    return text if text.isascii() and text.isprintable() else _INVISIBLE.sub("", text)

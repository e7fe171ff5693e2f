"""Prompts are read whole or refused in one line, and training meets each as often as any other of its tag."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtilt.errors import UserError
from flowtilt.prompts import Prompt, PromptWalk, load_prompts
from flowtilt.prompts.decoding import visible
from flowtilt.prompts.files import read_prompts

FEW = settings(deadline=None, max_examples=25)


def tagged(**sizes: int) -> list[Prompt]:
    return [Prompt(f"{tag} {k}", tag) for tag, size in sizes.items() for k in range(size)]


def written(tmp_path: Path, data: str | bytes, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# the walk --------------------------------------------------------------------------------------------


@FEW
@given(size=st.integers(1, 9), seed=st.integers(0, 99), passes=st.integers(1, 3))
def test_a_pass_meets_every_prompt_once(size, seed, passes):
    prompts = tagged(a=size)
    walk = PromptWalk(prompts, seed)
    for k in range(passes):
        assert {p.text for p in walk.take(k * size, size)} == {p.text for p in prompts}


@FEW
@given(few=st.integers(1, 4), many=st.integers(5, 9), seed=st.integers(0, 99))
def test_tags_take_turns_and_each_has_passes_of_its_own(few, many, seed):
    drawn = PromptWalk(tagged(few=few, many=many), seed).take(0, 2 * few * many)
    assert [p.tag for p in drawn] == ["few", "many"] * (few * many)
    for tag, size in (("few", few), ("many", many)):
        texts = [p.text for p in drawn if p.tag == tag]
        for start in range(0, len(texts), size):
            assert len(set(texts[start : start + size])) == size
    assert set(Counter(p.text for p in drawn if p.tag == "few").values()) == {many}


@FEW
@given(position=st.integers(0, 200), parts=st.lists(st.integers(0, 7), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_walk_is_a_pure_function_of_the_position(position, parts, seed):
    """Drawing 10 and then 10 is drawing 20, also in a walk that was made anew."""
    prompts = tagged(a=3, b=5)
    at, pieces = position, []
    for count in parts:
        pieces += PromptWalk(prompts, seed).take(at, count)
        at += count
    assert pieces == PromptWalk(prompts, seed).take(position, sum(parts))


def test_seeds_and_passes_differ_in_their_order():
    prompts = tagged(a=12)
    orders = [tuple(p.text for p in PromptWalk(prompts, seed).take(start, 12)) for seed in range(4) for start in (0, 12, 24)]
    assert len(set(orders)) == len(orders)


def test_tags_of_equal_size_are_not_shuffled_alike():
    drawn = PromptWalk(tagged(a=12, b=12), 0).take(0, 24)
    assert [p.text.split()[1] for p in drawn[::2]] != [p.text.split()[1] for p in drawn[1::2]]


def test_prompts_without_tags_are_one_tag():
    prompts = [Prompt(str(k)) for k in range(6)]
    assert sorted(p.text for p in PromptWalk(prompts, 1).take(6, 6)) == [str(k) for k in range(6)]


# files -----------------------------------------------------------------------------------------------


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = written(tmp_path, "a red circle\n\n  a blue square \r\nein grüner Kreis\n \t\nlast")
    assert load_prompts(path) == [Prompt("a red circle"), Prompt("a blue square"), Prompt("ein grüner Kreis"), Prompt("last")]
    assert load_prompts(str(path)) == load_prompts(path)


def test_json_lines_hold_a_caption_a_tag_and_whatever_a_reward_needs(tmp_path):
    lines = [
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": " two dogs "},
        {"prompt": "a cat"},
        {"prompt": "a cow", "tag": None},
    ]
    path = written(tmp_path, "\n\n".join(map(json.dumps, lines)) + "\n", "p.jsonl")
    first, second, third = load_prompts(path)
    assert first == Prompt("two dogs", "counting", {"include": [{"class": "dog", "count": 2}]})
    assert second == Prompt("a cat") and third == Prompt("a cow")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path, name):
    line = '{"prompt": "a"}' if name.endswith("jsonl") else "a"
    assert load_prompts(written(tmp_path, b"\xef\xbb\xbf" + line.encode(), name)) == [Prompt("a")]


def test_a_caption_that_occurs_again_is_kept_once_where_it_came_first(tmp_path):
    assert [p.text for p in load_prompts(written(tmp_path, "b\na\n b\nc\na\n"))] == ["b", "a", "c"]
    path = written(tmp_path, '{"prompt": "x", "tag": "1"}\n{"prompt": "x", "tag": "2"}\n', "p.jsonl")
    assert load_prompts(path) == [Prompt("x", "1")]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x1d"])
def test_only_line_ends_end_a_line(tmp_path, mark):
    """JSON leaves U+2028 as it is, and it is no end of a line in JSON lines."""
    text = f"a{mark}b"
    assert [p.text for p in load_prompts(written(tmp_path, text + "\nc\n"))] == [text, "c"]
    if mark > "\x1f":
        assert load_prompts(written(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False), "p.jsonl")) == [Prompt(text)]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "", "no prompt in the file"),
        ("p.txt", " \n\n\t\n", "no prompt in the file"),
        ("p.jsonl", "", "no prompt in the file"),
        ("p.txt", "a\nein Bär\n".encode("latin-1"), "byte 7 is not UTF-8"),
        ("p.jsonl", '{"prompt": "Bär"}'.encode("latin-1"), "byte 13 is not UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl:2: not JSON"),
        ("p.jsonl", "a red circle\n", "p.jsonl:1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', 'p.jsonl:3: no "prompt" text'),
        ("p.jsonl", '"a"\n', 'p.jsonl:1: no "prompt" text'),
        ("p.jsonl", '{"prompt": 3}\n', 'p.jsonl:1: no "prompt" text'),
        ("p.jsonl", '{"prompt": "  "}\n', 'p.jsonl:1: no "prompt" text'),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_in_one_line_that_says_where(tmp_path, name, data, message):
    path = written(tmp_path, data, name)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_lines_keep_what_a_judge_asks(tmp_path):
    """GenEval 2's keys."""
    line = {"prompt": "a pig", "atom_count": 1, "vqa_list": [["Are there any pigs in the image?", "Yes"]], "skills": ["object"]}
    assert load_prompts(written(tmp_path, json.dumps(line), "p.jsonl"))[0].metadata == {k: line[k] for k in list(line)[1:]}


def test_a_json_list_holds_captions_or_objects(tmp_path):
    path = written(
        tmp_path, '[ "a cat",\n\n{"id": "005695-0057",\n "prompt": " a [dog],\\n"}, {"prompt": "x",\n"tag": "t"}\n,"a \u2028 b"]', "p.json"
    )
    prompts = load_prompts(path)
    assert prompts == [Prompt("a cat"), Prompt("a [dog],", "", {"id": "005695-0057"}), Prompt("x", "t"), Prompt("a \u2028 b")]
    assert [p.where for p in prompts] == [f"{path}:{line}" for line in (1, 3, 4, 6)]


@FEW
@given(
    captions=st.lists(st.text(min_size=1).filter(lambda text: visible(text).strip()), min_size=1),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
)
def test_any_json_list_is_read_with_the_lines_on_which_its_elements_begin(tmp_path_factory, captions, indent, ascii):
    text = json.dumps([{"prompt": caption} for caption in captions], indent=indent, ensure_ascii=ascii)
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates in a file
    path = written(tmp_path_factory.mktemp("lists"), text.encode(), "p.json")
    for prompt in load_prompts(path):
        line = int(prompt.where.rpartition(":")[2])
        assert text.split("\n")[line - 1].lstrip(" [").startswith("{")


CSV = 'Prompts,Category\nA red cat.,Colors\n\n"A sign, ""Hi""",Text\n"two\nlines",Text\nA cat.,\n'


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_has_a_column_of_captions_and_perhaps_one_of_tags(tmp_path, delimiter):
    """DrawBench's header; quotes as spreadsheets write them."""
    name = "p.csv" if delimiter == "," else "p.TSV"
    path = written(tmp_path, CSV.replace(",", delimiter).replace(f"sign{delimiter}", "sign,").replace("\n", "\r\n"), name)
    prompts = load_prompts(path)
    assert prompts == [Prompt("A red cat.", "Colors"), Prompt('A sign, "Hi"', "Text"), Prompt("two\nlines", "Text"), Prompt("A cat.")]
    assert [p.where for p in prompts] == [f"{path}:{line}" for line in (2, 4, 5, 7)]


def test_a_tables_other_columns_are_metadata(tmp_path):
    path = written(tmp_path, "id,TEXT,prompt,note\n7,not this,a cat,\n8,nor this,a dog,x\n", "p.csv")
    assert load_prompts(path) == [
        Prompt("a cat", "", {"id": "7", "TEXT": "not this"}),
        Prompt("a dog", "", {"id": "8", "TEXT": "nor this", "note": "x"}),
    ]


def test_quotes_that_enclose_no_field_are_text_in_a_tab_separated_file(tmp_path):
    """A caption of PartiPrompts begins with the text to render; taking its quotes away would take the text away from OCR."""
    path = written(tmp_path, 'Prompt\tCategory\n"H I" painted on a wall\tArts\na cat\tAnimals\n', "p.tsv")
    assert load_prompts(path) == [Prompt('"H I" painted on a wall', "Arts"), Prompt("a cat", "Animals")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.csv", "", "no prompt in the file"),
        ("p.csv", "prompt,tag\n", "no prompt in the file"),
        ("p.csv", "\nname,tag\na,b\n", "p.csv:2: no column prompt, caption, prompts or text; it has name, tag"),
        ("p.csv", "prompt,tag\na cat,\n,colors\n", "p.csv:3: no prompt in the row"),
        ("p.csv", "prompt,tag\na cat, a dog and a cow,\n", "p.csv:2: 3 cells under 2 columns"),
        ("p.csv", 'prompt\na cat\n"a dog\na cow\n', "p.csv:3: not a readable row"),
        ("p.csv", 'prompt\n"H I" on a wall\n', "p.csv:2: not a readable row"),
        ("p.tsv", "prompt\ttag\na\tb\tc\n", "p.tsv:2: 3 cells under 2 columns"),
        ("p.json", "", "p.json:1: not JSON"),
        ("p.json", "[]", "no prompt in the file"),
        ("p.json", '["a",\n"b"', "p.json:2: not JSON"),
        ("p.json", '["a"] "b"', "p.json:1: not JSON"),
        ("p.json", '{"prompt": "a"}', "p.json:1: not a JSON list; a file of one object per line is named .jsonl"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "p.json:2: not JSON"),
        ("p.json", '["a",\n\n{"words": "b"}]', 'p.json:3: no "prompt" text'),
        ("p.json", '["a",\n" "]', 'p.json:2: no "prompt" text'),
        ("p.json", "[[1]]", 'p.json:1: no "prompt" text'),
    ],
)
def test_a_table_or_list_that_cannot_be_used_is_refused_in_one_line_that_says_where(tmp_path, name, data, message):
    test_a_file_that_holds_no_prompts_is_refused_in_one_line_that_says_where(tmp_path, name, data, message)


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    for path, reason in ((tmp_path / "none.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=reason) as caught:
            load_prompts(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_can_be_counted_although_their_metadata_is_a_dict():
    assert len({Prompt("a", "t", {"include": []}), Prompt("a", "t", {"include": []}), Prompt("b")}) == 2


# what first users met -----------------------------------------------------------------------------------


def texts(path):
    return [(p.text, p.tag) for p in read_prompts(path)]


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        # quotes that are inches, or never closed, swallow no rows
        ('Prompt\tCategory\n"Macbook\tA\na 13" laptop\tB\n', [('"Macbook', "A"), ('a 13" laptop', "B")]),
        ('Prompt\tCategory\n"Macbook\tA\nx\tB\na 13"\tC\n', [('"Macbook', "A"), ("x", "B"), ('a 13"', "C")]),
        ('id\tprompt\n1\t"a cat\n2\ta 13"\n', [('"a cat', ""), ('a 13"', "")]),
        ('prompt\n"a cat\na 13"\n', [('"a cat', ""), ('a 13"', "")]),
        # a caption that is all in quotes needs none as a cell, so they are its own
        ('Prompt\tCategory\n"Open"\tText\na cat\tAnimals\n', [('"Open"', "Text"), ("a cat", "Animals")]),
        # what spreadsheets quote
        ('Prompt\tCategory\r\n"a sign, ""Hi"""\tText\r\n"a cat, a dog"\tB\r\n', [('a sign, "Hi"', "Text"), ("a cat, a dog", "B")]),
        ('"prompt"\t"tag"\n"a cat"\t"A"\n""\t""\n"a dog"\t"B"\n', [("a cat", "A"), ("a dog", "B")]),
        ('prompt\ttag\n"two\nlines"\tA\n', [("two\nlines", "A")]),
    ],
)
def test_quotes_enclose_the_cells_of_a_tab_separated_file_only_where_it_shows_that_they_do(tmp_path, data, captions):
    assert texts(written(tmp_path, data, "p.tsv")) == captions


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.csv", 'tag, prompt\nx, "a sign, STOP"\ny, a cat\n'),
        ("p.csv", 'tag;prompt\nx;"a sign, STOP"\ny;a cat\n'),
        ("p.csv", "tag\tprompt\nx\ta sign, STOP\ny\ta cat\n".encode("utf-16")),
        ("p.tsv", "tag\tprompt\rx\ta sign, STOP\ry\ta cat\r"),
        ("p.csv", '\ufeff\ufefftag,prompt\nx,"a sign,\u200b STOP"\ny,a\x00 cat\n'),
        (
            "p.jsonl",
            '{"tag": "x", "caption": "a sign, STOP"}\r\n{"tag": "y", "caption": "a \\u200bcat"}\r\n'.encode("utf-16-be").join(
                [b"\xfe\xff", b""]
            ),
        ),
        ("p.ndjson", '{"tag": "x", "text": "a sign, STOP"}\n{"tag": "y", "text": "a cat"}\n\x00\x00\x00'),
        ("p.json", '[{"category": 1, "tag": "x", "prompt": "a sign, STOP"},\n{"tag": "y", "prompt": "a cat\ufeff"}]'.encode("utf-32")),
    ],
)
def test_what_programs_write_in_other_ways_reads_the_same(tmp_path, name, data):
    assert texts(written(tmp_path, data, name)) == [("a sign, STOP", "x"), ("a cat", "y")]


def test_invisible_characters_go_and_joiners_inside_other_scripts_stay():
    assert visible("\u200ba\ufeff \u00adcat\x00\u202e\u200d") == "a cat"
    assert visible("a\tb\nc") == "a\tb\nc"
    family, persian = "\U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert visible(family) == family and visible(persian) == persian


def test_what_is_left_out_is_said_once_with_how_many(tmp_path, capsys):
    path = written(tmp_path, "a cat\n# note\na cat\n\u200ba cat\u200b\n")
    for _ in range(2):
        assert [p.text for p in load_prompts(path)] == ["a cat", "# note"]
    said = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(f"prompts {path}: ") for line in said] == [
        "invisible characters removed from 1 line, line 4 first",
        "1 line beginning with # or // read as captions, line 2 first; there are no comments",
        "2 of 4 captions repeat an earlier one and are left out, line 3 first",
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt.gz", gzip.compress(b"a cat", mtime=0), "gzip-compressed; unpack it"),
        ("p.csv", gzip.compress(b"prompt\na cat", mtime=0), "gzip-compressed; unpack it"),
        ("p.parquet", b"PAR1\x15\x04\x15", "a Parquet file; pandas"),
        ("p.xlsx", b"PK\x03\x04\x14", "an Excel workbook"),
        ("p.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        ("p.txt", b"<!DOCTYPE html>\n<html>", "an HTML page"),
        ("p.txt", "a cat\na dog\n".encode("utf-16-le"), "looks like UTF-16 (little endian) without a byte order mark"),
        ("p.txt", b"\xff\xfea\x00\x00", "byte 4 is not UTF-16-LE"),
        ("p.txt", '{"prompt": "a cat"}\n', "p.txt:1: a JSON object in a text file; name the file .jsonl"),
        ("p.csv", "a cat on a mat\na dog\n", "add a header, or name a file of one caption per line .txt"),
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "b", "n": ' + "9" * 5000 + "}\n",
            "p.jsonl:2: JSON that can't be read (an integer of too many",
        ),
        ("p.jsonl", '{"prompt": "a"}\n' + "[" * 100_000 + "\n", "p.jsonl:2: JSON that can't be read (nested too deeply)"),
        ("p.json", "[" * 100_000, "JSON that can't be read (nested too deeply)"),
        ("p.json", "[" + "9" * 5000 + "]", "JSON that can't be read (an integer of too many"),
        ("p.jsonl", '{"prompt": "a", "x": "\\ud83d"}\n', "p.jsonl:1: half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "tag": "\\ud83d"}\n', "p.jsonl:1: half of a surrogate pair"),
        ("p.jsonl", '{"prompt": "a", "tag": ["b"]}\n', 'p.jsonl:1: "tag" must be text'),
        ("p.jsonl", '{"prompt": "\\u200b"}\n', 'p.jsonl:1: no "prompt" text'),
    ],
)
def test_what_a_file_is_instead_is_said_in_one_line(tmp_path, name, data, message):
    test_a_file_that_holds_no_prompts_is_refused_in_one_line_that_says_where(tmp_path, name, data, message)


# turns -----------------------------------------------------------------------------------------------------

MIXED = [Prompt(f"{tag}{k}", tag) for tag, number in (("a", 5), ("b", 2), ("c", 9)) for k in range(number)]


def test_a_tags_turns_are_its_share_of_every_round():
    drawn = PromptWalk(MIXED, 0, {"a": 3, "c": 0}).take(0, 40)
    assert [p.tag for p in drawn[:4]] == ["a", "a", "a", "b"]
    assert [sum(p.tag == tag for p in drawn) for tag in "abc"] == [30, 10, 0]


def test_turns_keep_each_tags_own_walk():
    """More turns only walk faster through the same order."""
    alone = [p.text for p in PromptWalk(MIXED, 3, {"b": 0, "c": 0}).take(0, 12)]
    mixed = [p.text for p in PromptWalk(MIXED, 3, {"a": 4}).take(0, 18) if p.tag == "a"]
    assert mixed == alone
    assert PromptWalk(MIXED, 3, {"a": 1, "b": 1}).take(5, 20) == PromptWalk(MIXED, 3).take(5, 20)


def test_any_number_of_turns_costs_no_memory():
    drawn = PromptWalk(MIXED, 0, {"a": 10**30}).take(10**30 - 2, 4)
    assert [p.tag for p in drawn] == ["a", "a", "b", "c"]


def test_turns_of_a_tag_that_is_not_there_are_refused_unless_they_are_none():
    assert PromptWalk(MIXED, 0, {"d": 0}).take(0, 1)
    with pytest.raises(UserError, match=r"tags\.d: no prompt has this tag; they have a, b, c"):
        PromptWalk(MIXED, 0, {"d": 2})
    with pytest.raises(UserError, match="no tag is left"):
        PromptWalk(MIXED, 0, {"a": 0, "b": 0, "c": 0})


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "broken \\ud83d"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: half of a surrogate pair"):
        load_prompts(tmp_path / "p.jsonl")

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.models.reference import RepoReference, parse_reference


def ref(repo="o/n", revision=None, file=None):
    return RepoReference(repo=repo, revision=revision, file=file)


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("o/n", ref()),
        (" o/n/ ", ref()),
        ("o/n@main", ref()),
        ("o/n@v1.0/", ref(revision="v1.0")),
        (f"o/n@{SHA}", ref(revision=SHA)),
        ("o/n@refs/pr/3", ref(revision="refs/pr/3")),
        ("o/n@feature/x", ref(revision="feature/x")),
        ("o/n/a.gguf", ref(file="a.gguf")),
        ("o/n/sub/My Model (1).GGUF", ref(file="sub/My Model (1).GGUF")),
        ("o/n/sub/a.gguf@v1", ref(file="sub/a.gguf", revision="v1")),
        ("o/n@v1/sub/a.gguf", ref(file="sub/a.gguf", revision="v1")),
        ("o/n/a@b.gguf", ref(file="a@b.gguf")),
        ("o/n/a@b.gguf@v1", ref(file="a@b.gguf", revision="v1")),
        ("o/n@refs/pr/3/a.gguf", ref(file="a.gguf", revision="refs/pr/3")),
        ("https://huggingface.co/o/n", ref()),
        ("http://www.huggingface.co/o/n/", ref()),
        ("HTTPS://HuggingFace.co/o/n?library=mlx#usage", ref()),
        ("huggingface.co/o/n", ref()),
        ("hf.co/o/n", ref()),
        ("hf://o/n", ref()),
        ("hf://o/n@v1/a.gguf", ref(revision="v1", file="a.gguf")),
        ("https://hf.co/o/n/tree/main", ref()),
        ("https://huggingface.co/o/n/tree/refs%2Fpr%2F3", ref(revision="refs/pr/3")),
        ("https://huggingface.co/o/n/tree/refs/pr/3", ref(revision="refs/pr/3")),
        (f"https://huggingface.co/o/n/commit/{SHA}", ref(revision=SHA)),
        (
            "https://huggingface.co/o/n/blob/main/a%20b.gguf",
            ref(file="a b.gguf"),
        ),
        (
            "https://huggingface.co/o/n/resolve/v1/sub/a.gguf?download=true",
            ref(revision="v1", file="sub/a.gguf"),
        ),
        ("https://huggingface.co/o/n/blob/main/model.safetensors", ref()),
        ("https://huggingface.co/o/n/resolve/v1/config.json", ref(revision="v1")),
        ("https://huggingface.co/o/n.gguf", ref(repo="o/n.gguf")),
    ],
)
def test_what_people_write(text, expected):
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "n",
        "m/x.gguf",
        "m/X.GGUF",
        "a/b/c",
        "a/../b.gguf",
        "o/n/../../x.gguf",
        "o/n@",
        "o/n@../../x",
        "o/n@a//b",
        "o/n@-x",
        "o/n@x.gguf",
        "https:///o/n",
        "./o/n",
        "/o/n",
        "o n/x",
        "https://huggingface.co/o",
        "https://huggingface.co/datasets/o/n",
        "https://huggingface.co/spaces/o/n",
        "https://huggingface.co/o/n/tree/main/sub",
        "https://huggingface.co/o/n/discussions/1",
        "https://example.com/o/n",
        "ftp://huggingface.co/o/n",
    ],
)
def test_what_is_no_repository(text):
    assert parse_reference(text) is None


def test_a_mirror_is_known_by_its_setting(monkeypatch):
    assert parse_reference("https://mirror.example/o/n") is None
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert parse_reference("https://mirror.example/o/n/tree/v1") == ref(revision="v1")


WORDS = [
    "o",
    "n",
    "hf.co",
    "https:",
    "huggingface.co",
    "tree",
    "resolve",
    "main",
    "refs",
    "pr",
    "3",
]
PIECES = st.sampled_from(
    [*WORDS, "/", "/", "/", "@", ".", "..", ".gguf", "?", "#", "%2F", "%", "\0"]
)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, derandomize=True)
@given(text=st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=12))
def test_whatever_is_read_is_read_again_as_it_is_written(text):
    found = parse_reference(text)
    assert found is None or parse_reference(str(found)) == found
    if found is not None:
        assert found.repo.count("/") == 1
        parts = f"{found.repo}/{found.revision}/{found.file}".split("/")
        assert not {"", ".", ".."} & set(parts)

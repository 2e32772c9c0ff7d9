import pytest

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
    assert parse_reference(str(expected)) == expected or expected.repo == "o/n.gguf"


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

"""What llama.cpp makes of a text, by real GGUF files: log-probabilities of its tokens.

Made once, with llama-cpp-python 0.3.36 on a CPU. Neither that nor the models are in this
repository; put GGUF files into a folder of their own. Two steps, for llama-cpp-python is built from
source, in an environment of its own:

    python tests/oracle/llama_cpp_logits.py write FOLDER
    python-with-llama-cpp tests/oracle/llama_cpp_logits.py compute FOLDER

The first writes `FOLDER/f32/` (each file with its weights as f32, for llama.cpp rounds activations
wherever weights are quantised) and the tokens. The second puts what llama.cpp says of them into
`llama_cpp.npz`: of each file `text`, the `ids` of its beginning, and `chosen`, the log-probability
of each next one. What it has of files that are not in the folder stays. The test is
`tests/model/test_llama_cpp_oracle.py`.
"""

import json
import pathlib
import sys

import numpy as np

NUM_SCORED = 512
PUBLISHED = pathlib.Path(__file__).with_name("llama_cpp.npz")
_PROSE = pathlib.Path(__file__).parents[2] / "bench" / "alice.txt"
_PROSE_CHARS = 1200
_TEXT_CHARS = 4000
_MODULES = ("textwrap", "heapq", "dataclasses", "contextlib", "statistics")


def text() -> str:
    """Prose, then what Python's help says of a few functions."""
    import importlib
    import inspect

    docs = []
    for name in _MODULES:
        module = importlib.import_module(name)
        for word in module.__all__:
            docs.append(f"{name}.{word}\n\n{inspect.getdoc(getattr(module, word)) or ''}")
    prose = _PROSE.read_text(encoding="utf-8")[:_PROSE_CHARS]
    return "\n\n".join([prose, *docs])[:_TEXT_CHARS]


def write(folder: pathlib.Path) -> None:
    """Each model in f32, and what is asked of it."""
    from edgekv.models.open_model import open_tokenizer

    (folder / "f32").mkdir(exist_ok=True)
    asked = text()
    for path in sorted(folder.glob("*.gguf")):
        ids = open_tokenizer(path).encode(asked)[: NUM_SCORED + 1]
        assert len(ids) == NUM_SCORED + 1
        to = folder / "f32" / path.name
        to.with_suffix(".json").write_text(json.dumps({"text": asked, "ids": ids}))
        if not to.exists():
            partial = to.with_suffix(".partial")
            write_f32(path, partial)
            partial.rename(to)


def write_f32(path: pathlib.Path, to: pathlib.Path) -> None:
    """The same GGUF file with all weights as f32."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture, use_temp_file=False)
    written_by_itself = ("GGUF.", "general.architecture", "general.file_type")
    for name, field in reader.fields.items():
        if not name.startswith(written_by_itself):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * tensor.n_elements)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:  # one at a time: a whole model in f32 need not fit into memory
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(np.ascontiguousarray(values, dtype=np.float32))
    writer.close()


def compute(folder: pathlib.Path) -> None:
    """Log-probabilities of one forward pass with keys, values and products in f32."""
    from llama_cpp import GGML_TYPE_F32, Llama

    found = dict(np.load(PUBLISHED)) if PUBLISHED.exists() else {}
    for question in sorted((folder / "f32").glob("*.json")):
        asked = json.loads(question.read_text())
        ids = asked["ids"]
        llama = Llama(
            str(question.with_suffix(".gguf")),
            n_ctx=2 * NUM_SCORED,
            logits_all=True,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
        theirs = llama.tokenize(asked["text"].encode(), special=True)
        assert theirs[: len(ids)] == ids, f"{question.stem}: llama.cpp has other tokens"
        llama.eval(ids)
        logits = np.asarray(llama.scores[: len(ids)])
        found[f"{question.stem} text"] = np.array(asked["text"])
        found[f"{question.stem} ids"] = np.array(ids, dtype=np.int32)
        found[f"{question.stem} chosen"] = chosen(logits, ids)
        llama.close()
    np.savez_compressed(PUBLISHED, **found)


def chosen(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Of logits `(T, vocab)` of all T ids: `(T - 1,)`, each next id's log-probability."""
    found = []
    for row, token in zip(logits[:-1].astype(np.float64), ids[1:], strict=True):
        highest = row.max()
        found.append(row[token] - highest - np.log(np.exp(row - highest).sum()))
    return np.array(found, dtype=np.float32)


if __name__ == "__main__":
    {"write": write, "compute": compute}[sys.argv[1]](pathlib.Path(sys.argv[2]))

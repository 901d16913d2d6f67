"""Texts from a small untrained model: files, settings, and the same continuation in every batch."""

import json

import pytest
import torch

from dataset_loading.text.windows import TextDataset, prepare_text
from inference.generate_text import generate
from model.causal import MegaTransformerForCausalLM
from tests.helpers.image_vae_checkpoint import save_checkpoint
from tests.helpers.processes import newest_results
from tests.helpers.runs import changed
from tests.helpers.text_cache import make_text
from tests.helpers.text_checkpoint import save_text_checkpoint
from utils.command_line import parse_arguments
from utils.generation.arguments.text import GenerateTextArguments, GenerationArguments
from utils.generation.text import TextGenerator, read_prompts, sampling_processors

PROMPTS = ["a list of", "Zwölf bears", "the tensor is a model that reads and writes, again and again,", ""]


@pytest.fixture(scope="module")
def text_cache(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("texts") / "bytes")


@pytest.fixture(scope="module")
def checkpoint(text_cache, tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("runs") / "small", text_cache, "tiny")


@pytest.fixture(scope="module")
def deep(text_cache, tmp_path_factory):
    fields = {"recurrent_exit_criterion": "kl", "recurrent_mean_thinking_steps": 4}
    return save_text_checkpoint(tmp_path_factory.mktemp("runs") / "deep", text_cache, "recurrent-tiny", **fields)


@pytest.fixture
def run(checkpoint, tmp_path):
    """run(name, *words): write into `tmp_path / name`; returns the settings, with the texts."""

    def call(name, *words, of=checkpoint):
        folder = tmp_path / name
        flags = ["--checkpoint", str(of), "--output_dir", str(folder), "--max_new_tokens", "12"]
        generate(parse_arguments(GenerateTextArguments, changed(flags, *map(str, words)), ""))
        folder = newest_results(folder)
        return json.loads((folder / "settings.json").read_text())

    return call


def continuations(settings: dict) -> list[str]:
    return [text["continuation"] for text in settings["texts"]]


def test_files_and_settings(run, checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("zwölf Bären\n\n  indented\n", encoding="utf-8")
    words = ["--prompts", "A key", "--prompt_file", tmp_path / "prompts.txt", "--temperature", 0.5, "--top_k", 5]
    settings = run("out", *words)
    assert [text["prompt"] for text in settings["texts"]] == ["A key", "zwölf Bären", "  indented"]
    assert [text["file"] for text in settings["texts"]] == ["000.txt", "001.txt", "002.txt"]
    first = settings["texts"][1]
    assert (tmp_path / "out" / "001.txt").read_text(encoding="utf-8") == first["prompt"] + first["continuation"]
    assert settings["checkpoint"] == str(checkpoint) and settings["weights"] == "ema" and "git_commit" in settings
    assert settings["temperature"] == 0.5 and settings["top_k"] == 5 and settings["seed"] == 0
    assert "zwölf Bären" + first["continuation"] in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--temperature 0", "--temperature 1 --top_p 0.9", "--temperature 0 --n_beams 3"])
@pytest.mark.parametrize("size", ["flat", "deep"])
def test_a_batch_equals_single_runs(words, size, run, request):
    of = request.getfixturevalue("checkpoint" if size == "flat" else "deep")
    words = ["--prompts", *PROMPTS, *words.split()]
    together = continuations(run("together", *words, of=of))
    assert together == continuations(run("alone", *words, "--batch_size", 1, of=of))
    assert len(set(together)) == 4 and all(together)


def test_greedy_is_the_most_probable_token_each_time(run, checkpoint):
    generator = TextGenerator.load(checkpoint)
    (text,) = continuations(run("greedy", "--prompts", "a list", "--temperature", 0))
    ids = generator.encode("a list")
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(generator.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert generator.decode(generator.truncate_at_end(torch.tensor(ids[7:]))) == text


def test_noise_samples_from_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = sampling_processors(GenerationArguments(temperature=0.7, top_k=3), [0])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draws(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).argmax()] += 1
    expected = torch.cat([(logits[0, :3] / 0.7).softmax(0), torch.zeros(1)])
    assert (counts / 4000 - expected).abs().max() < 0.03 and counts[3] == 0


def test_seeds_and_weights_matter(run):
    words = ["--prompts", "a list"]
    first = continuations(run("first", *words))
    assert continuations(run("again", *words)) == first
    assert continuations(run("seed", *words, "--seed", 1)) != first
    assert continuations(run("raw", *words, "--weights", "raw")) != first


def test_thinking_steps_and_exits(run, deep, checkpoint):
    words = ["--prompts", "a list", "--temperature", 0]
    full = continuations(run("full", *words, "--exit_threshold", 0, of=deep))
    assert continuations(run("four", *words, "--thinking_steps", 4, "--exit_threshold", 0, of=deep)) == full
    assert continuations(run("one", *words, "--thinking_steps", 1, "--exit_threshold", 0, of=deep)) != full
    # Every token leaves after the second step.
    two = continuations(run("two", *words, "--thinking_steps", 2, "--exit_threshold", 0, of=deep))
    assert continuations(run("exits", *words, "--exit_threshold", 1e9, of=deep)) == two
    with pytest.raises(ValueError, match="--thinking_steps has no effect: the model has no recurrent core"):
        run("flat", *words, "--thinking_steps", 2)


def test_an_end_of_document_ends_the_text(checkpoint):
    generator = TextGenerator.load(checkpoint)
    end = generator.model.config.eos_token_id
    assert generator.truncate_at_end(torch.tensor([5, 6, end, 7])) == [5, 6]
    assert generator.truncate_at_end(torch.tensor([5, 6])) == [5, 6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--checkpoint runs/x", "--prompts or --prompt_file are needed"),
        ("--checkpoint runs/x --prompts a --n_beams 2", "it needs --temperature 0"),
        ("--checkpoint runs/x --prompts a --temperature 0 --top_k 2", "--top_k has no effect"),
        ("--checkpoint runs/x --prompts a --temperature 0 --n_texts 2", "--n_texts has no effect"),
        ("--checkpoint runs/x --prompts a --exit_threshold -0.5", "must be -1, 0 or above"),
        ("--checkpoint runs/x --prompts a --top_p 0", "--top_p=0.0 must be > 0"),
    ],
)
def test_flags_that_are_needed_or_have_no_effect(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(GenerateTextArguments, words.split(), "")
    assert message in capsys.readouterr().err


def test_another_stage_and_an_empty_file_are_refused(run, image_cache, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no line with text"):
        run("out", "--prompt_file", tmp_path / "empty.txt")
    vae = save_checkpoint(tmp_path / "image_vae" / "small", image_cache)
    with pytest.raises(ValueError, match="checkpoints of stage 'multimodal'"):
        run("out", "--prompts", "a", of=vae)


def test_several_texts_per_prompt(run):
    words = ["--prompts", "a list", "a list", "the", "--n_texts", 3]
    settings = run("several", *words, "--batch_size", 4)
    made = continuations(settings)
    assert len(made) == 9 and len(set(made[:3])) == 3 and made[:3] == made[3:6]
    assert made[0] == continuations(run("one", "--prompts", "a list"))[0]
    seed = settings["texts"][2]["seed"]
    assert made[2] == continuations(run("again", "--prompts", "a list", "--seed", seed))[0]
    assert continuations(run("other", *words, "--seed", 1))[1] not in made


def test_prompts_are_encoded_as_training_texts(tmp_path, checkpoint):
    (tmp_path / "raw.txt").write_text("ends with <bos> and <pad>" * 40, encoding="utf-8")
    # A tokenizer from elsewhere, which reads special tokens.
    foreign = TextGenerator.load(checkpoint).tokenizer
    foreign.split_special_tokens = foreign.init_kwargs["split_special_tokens"] = False
    foreign.save_pretrained(tmp_path / "foreign")
    source, tokenizer = str(tmp_path / "raw.txt"), str(tmp_path / "foreign")
    texts = TextDataset(prepare_text(source, tmp_path / "cache", tokenizer, validation_fraction=0.0), "train", 8)
    document = texts.document(0).tolist()
    text = bytes(number - 2 for number in document[1:-1]).decode()
    generator = TextGenerator(MegaTransformerForCausalLM.from_preset("tiny", hidden_size=64), texts.tokenizer)
    assert "<bos>" in text and generator.encode(text) == document[:-1]


def test_lengths_beyond_the_model(text_cache, tmp_path, run, checkpoint, caplog):
    words = ["--prompts", "x" * 20]
    run("within", *words)
    assert not caplog.records
    run("beyond", *words, "--max_new_tokens", 13, "--n_texts", 2, "--batch_size", 1)
    (record,) = caplog.records
    assert "21 tokens and max_new_tokens=13 need 33 positions" in record.message
    assert "--sequence_length 32" in record.message
    fields = {"position_embedding": "learned", "use_rotary_embedding": False, "max_position_embeddings": 32}
    learned = save_text_checkpoint(tmp_path / "learned", text_cache, "tiny", **fields)
    run("fits", *words, of=learned)
    with pytest.raises(ValueError, match="need 33 positions, the model has learned max_position_embeddings=32"):
        run("out", *words, "--max_new_tokens", 13, of=learned)


def test_prompt_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\n two\u2028still two\n\nthree\x0b\x0c".encode())
    assert read_prompts(file) == ["one", " two\u2028still two", "three\x0b\x0c"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"--prompt_file .*prompts.txt: line 1 is not UTF-8.*iconv"):
        read_prompts(file)
    # As tables, files of Windows and of old Macs are read; what would be lost in silence is named.
    file.write_bytes("one\r\nvier Käfer\r\n".encode("utf-16"))
    assert read_prompts(file) == ["one", "vier Käfer"]
    file.write_bytes(b"one\rtwo\r")
    assert read_prompts(file) == ["one", "two"]
    for content, message in ((b"one\n\ntwo \0", "line 3 has a NUL byte"), (b" \n", "no line with text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"prompts.txt.*{message}"):
            read_prompts(file)
    with pytest.raises(IsADirectoryError, match=f"--prompt_file {tmp_path} is a folder"):
        read_prompts(tmp_path)

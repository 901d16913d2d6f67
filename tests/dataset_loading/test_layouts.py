"""Layouts that people have: where the text and the speaker of a file are found."""

import gzip
import json
import unicodedata

import pytest

from dataset_loading.audio.signal import AUDIO_SUFFIXES
from dataset_loading.sources import open_source

SPEECH = ["84-1-0000.flac", "84-1-0001.flac"]


def open_audio(name, split="train"):
    return open_source(str(name), split, "audio", suffixes=AUDIO_SUFFIXES)


def texts(source, *, column="text"):
    return {name: row.get(column) for name, row in source}


@pytest.fixture
def lay(tmp_path):
    """Writes files by name; those without content are recordings, which are not decoded here."""

    def write(files):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize("ending", ["txt", "lab", "caption", "normalized.txt"])
def test_sidecars(lay, ending):
    folder = lay({"a.wav": "", f"a.{ending}": "\ufeff good day \n", "sub/b.wav": ""})
    source = open_audio(folder)
    assert texts(source) == {"a.wav": "good day", "sub/b.wav": None} and "text" in source.columns
    assert not source.left_out


def test_librispeech(lay):
    folder = lay({f"84/1/{name}": "" for name in SPEECH} | {"84/1/84-1.trans.txt": "84-1-0000 GO ON\n84-1-0001 NO\n"})
    source = open_audio(folder)
    assert texts(source) == {"84/1/84-1-0000.flac": "GO ON", "84/1/84-1-0001.flac": "NO"}
    assert set(texts(source, column="speaker").values()) == {"84"} and not source.left_out


def test_librispeech_with_transcripts_and_recordings_missing(lay):
    words = {"84/1/84-1.trans.txt": "84-1-0000 GO ON\n84-1-0007 GONE\n"}
    source = open_audio(lay({f"84/1/{name}": "" for name in SPEECH} | words))
    assert set(texts(source, column="speaker").values()) == {"84"}
    assert source.left_out.as_dict() == {"transcript without a recording": {"count": 1, "names": ["84/1/84-1-0007"]}}


@pytest.mark.parametrize("name", ["a.TXT", "84-1.trans.txt"])
def test_nul_bytes_in_texts_are_named(lay, name):
    with pytest.raises(ValueError, match=rf"{name}: line 2 has a NUL byte.*tr -d"):
        open_audio(lay({"a.wav": "", "84-1-0000.wav": "", name: "84-1-0000 go\non \0"}))


def test_capitals_in_endings_and_separators_of_windows(lay):
    folder = lay({"a.WAV": "", "a.TXT": "upper", "sub/b.wav": "", "sub/b.Lab": "mixed"})
    assert texts(open_audio(folder)) == {"a.WAV": "upper", "sub/b.wav": "mixed"}
    (folder / "metadata.csv").write_text("file_name,text\na.WAV,one\nsub\\b.wav,two\n")
    assert texts(open_audio(folder)) == {"a.WAV": "one", "sub/b.wav": "two"}


def test_vctk_takes_one_microphone(lay):
    names = ["p225_001_mic1.flac", "p225_001_mic2.flac", "p225_002_mic2.flac"]
    words = {"txt/p225/p225_001.txt": "Please call Stella.\n", "txt/p225/p225_002.txt": "Ask her."}
    source = open_audio(lay({f"wav48/p225/{name}": "" for name in names} | words))
    assert texts(source) == {
        "wav48/p225/p225_001_mic1.flac": "Please call Stella.",
        "wav48/p225/p225_002_mic2.flac": "Ask her.",
    }
    assert set(texts(source, column="speaker").values()) == {"p225"}
    assert source.left_out.counts == {"second microphone of an utterance": 1}


def test_common_voice(lay):
    header, row = "client_id\tpath\tsentence\tage", 'x1\ta.mp3\t"Yes" he said.\t\n'
    folder = lay({"clips/a.mp3": "", "clips/b.mp3": "", "train.tsv": f"{header}\n{row}", "test.tsv": f"{header}\n"})
    source = open_audio(folder)
    assert texts(source, column="sentence") == {"clips/a.mp3": '"Yes" he said.'}
    assert texts(source, column="client_id") == {"clips/a.mp3": "x1"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("train_manifest.json", {"audio_filepath": "a.wav", "text": "hola", "duration": 1.5}),
        ("list.jsonl", {"audio": {"path": "a.wav"}, "text": "hola", "duration": 1.5}),
        ("metadata.json", {" File_Name ": " a.wav", "Text": "hola"}),
    ],
)
def test_manifests_of_nemo_and_whisper(lay, name, row):
    folder = lay({"a.wav": "", name: json.dumps(row) + "\n"})
    assert texts(open_audio(folder if name.startswith("metadata") else folder / name)) == {"a.wav": "hola"}


def test_compressed_manifests_are_read_and_other_single_files_named(lay):
    folder = lay({"a.wav": "", "list.txt": "a.wav"})
    with gzip.open(folder / "m.jsonl.gz", "wt") as file:
        file.write(json.dumps({"audio_filepath": "a.wav", "text": "hola"}))
    assert texts(open_audio(folder / "m.jsonl.gz")) == {"a.wav": "hola"}
    for name in ("a.wav", "list.txt"):
        with pytest.raises(FileNotFoundError, match=rf"{name} is no table.*\.jsonl.*folder"):
            open_audio(folder / name)


@pytest.mark.parametrize("name", ["metadata.csv", "train.csv"])
def test_tables_without_rows_are_named(lay, name):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{name} has no rows; write one for each"):
        open_audio(lay({"a.wav": "", name: "file_name,text\n"}))


def test_ljspeech_with_bars_in_a_text_is_an_error(lay):
    folder = lay({"wavs/a.wav": "", "metadata.csv": "a|Mr. A|Mister A\na|one|two|three\n"})
    with pytest.raises(ValueError, match=r"metadata\.csv: line 2 must read id\|text"):
        open_audio(folder)


def test_names_with_composed_and_decomposed_letters_are_the_same(lay):
    decomposed = unicodedata.normalize("NFD", "señal/é.wav")
    folder = lay({decomposed: "", "metadata.csv": "file_name,text\nseñal/é.wav,hola\n"})
    assert texts(open_audio(folder)) == {decomposed: "hola"}

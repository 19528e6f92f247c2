"""Files of the benchmarks: answers that survive kills, mistakes by line, `moextend eval score`, no traceback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import benchmark_files
import pytest

from moextend_jax import cli
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks import answers, table
from moextend_jax.evaluate.benchmarks.question import Question, check_images, image_bytes

NUMBER = 5


def line(n: int, **changed: Any) -> dict[str, Any]:
    return {"question_id": n, "image": f"{n}.jpg", "text": f"Q{n}?\nAnswer", "category": "random"} | changed


def pope(folder: Path, entries: list[dict[str, Any]] | None = None) -> Path:
    """A tiny POPE, all answers of which are no."""
    entries = [line(n) for n in range(NUMBER)] if entries is None else entries
    home = folder / "pope"
    (home / "coco").mkdir(parents=True, exist_ok=True)
    (home / "llava_pope_test.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    labels = [{"image": f"{n}.jpg", "text": f"Q{n}?", "label": "no"} for n in range(NUMBER)]
    (home / "coco" / "coco_pope_random.json").write_text("".join(json.dumps(label) + "\n" for label in labels))
    return home / "llava_pope_test.jsonl"


def opened(folder: Path, path: Path, *, model_id: str = "m", name: str = "pope") -> answers.Answers:
    return table.open_answers(name, path, questions=table.read(name, folder), model_id=model_id)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_llavas_lines_and_go_on_where_they_stopped(tmp_path: Path):
    pope(tmp_path)
    questions, path = table.read("pope", tmp_path), tmp_path / "deep" / "answers.jsonl"
    with opened(tmp_path, path) as some:
        assert some.texts == {}
        some.append(questions[3], "No\nway \ud800é")
        some.append(questions[0], "")
        assert some.texts.keys() == {questions[3].key, questions[0].key}
        with pytest.raises(ValueError, match="has its answer"):
            some.append(questions[3], "Yes")
    entries = [json.loads(one) for one in path.read_text().splitlines()]
    assert list(entries[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert entries[0]["prompt"] == "Q3?\nAnswer" and entries[0]["text"] == "No\nway \ud800é"
    with opened(tmp_path, path) as rest:
        assert rest.texts.keys() == {questions[3].key, questions[0].key}
        for question in questions:
            if question.key not in rest.texts:
                rest.append(question, "No")
    answered = table.read_answered("pope", path, questions=questions)
    assert [one.text for one in answered] == ["", "No", "No", "No\nway \ud800é", "No"]
    assert [one.question for one in answered] == questions


def test_equal_runs_write_equal_files(tmp_path: Path):
    pope(tmp_path)
    for name in ("a", "b"):
        with opened(tmp_path, tmp_path / name) as some:
            some.append(table.read("pope", tmp_path)[0], "No")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_mmbench_answers_have_llavas_further_fields(tmp_path: Path):
    head = "index\tquestion\thint\tA\tB\tC\tD\timage\n"
    (tmp_path / "mmbench_dev_20230712.tsv").write_text(head + "241\tQ?\t\tone\ttwo\t\t\taGk=\n")
    path = tmp_path / "answers.jsonl"
    with opened(tmp_path, path, name="mmbench") as some:
        some.append(table.read("mmbench", tmp_path)[0], "B")
    entry = json.loads(path.read_text())
    assert entry["prompt"] == "Q?\nA. one\nB. two"  # without the instruction, as LLaVA has it
    assert entry["options"] == ["one", "two"] and entry["option_char"] == ["A", "B"] and entry["round_id"] == 0
    with opened(tmp_path, path, name="mmbench") as some:
        assert len(some.texts) == 1


@pytest.mark.parametrize("cut", [1, 2, 40, 90])
def test_a_torn_last_line_is_dropped_and_asked_again(tmp_path: Path, cut: int):
    pope(tmp_path)
    questions, path = table.read("pope", tmp_path), tmp_path / "answers.jsonl"
    with opened(tmp_path, path) as some:
        for question in questions[:2]:
            some.append(question, "No")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = 2 if cut == 1 else 1  # without its line break alone, the last line is whole
    assert len(table.read_answered("pope", path, questions=questions, partial=True)) == kept
    with opened(tmp_path, path) as some:
        assert len(some.texts) == kept
        for question in questions[kept:]:
            some.append(question, "No")
    assert path.read_bytes().startswith(whole) and len(path.read_bytes().splitlines()) == NUMBER


def test_a_file_of_something_else_is_left_alone(tmp_path: Path):
    pope(tmp_path)
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(MoextendError, match=r"notes\.txt:1: not JSON"):
        opened(tmp_path, path)
    assert path.read_text() == "my notes"


def test_killed_anywhere_no_answer_is_lost_or_doubled(tmp_path: Path):
    """A process that answers 3,000 questions is killed with SIGKILL again and again until it is through."""
    entries = [line(n) for n in range(3000)]
    pope(tmp_path, entries)
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from moextend_jax.evaluate.benchmarks import table
        folder, path = Path(sys.argv[1]), Path(sys.argv[2])
        questions = table.read("pope", folder)
        with table.open_answers("pope", path, questions=questions, model_id="m") as some:
            print(len(some.texts), flush=True)
            for question in questions:
                if question.key not in some.texts:
                    some.append(question, f"No {question.question_id} " + "x" * 2000)
        """
    )
    path, draw, seen = tmp_path / "answers.jsonl", random.Random(0), []
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    for kill in (True, True, True, False):
        command = [sys.executable, "-c", program, str(tmp_path), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            seen.append(int(process.stdout.readline()))
            if kill:
                enough = path.stat().st_size + draw.randrange(100_000, 1_000_000)
                while process.poll() is None and path.stat().st_size < enough:
                    time.sleep(0.0001)
                process.send_signal(signal.SIGKILL)
    assert seen == sorted(seen) and seen[0] == 0 < seen[1]
    answered = table.read_answered("pope", path, questions=table.read("pope", tmp_path))
    assert [text.split()[1] for _, text in answered] == [str(n) for n in range(3000)]
    assert len(path.read_bytes().splitlines()) == 3000


def test_one_process_writes(tmp_path: Path):
    pope(tmp_path)
    path = tmp_path / "answers.jsonl"
    with opened(tmp_path, path), pytest.raises(MoextendError, match="another process is writing"):
        opened(tmp_path, path)
    opened(tmp_path, path).close()


def test_answers_of_another_run_are_refused(tmp_path: Path):
    pope(tmp_path)
    path = tmp_path / "answers.jsonl"
    with opened(tmp_path, path) as some:
        some.append(table.read("pope", tmp_path)[0], "No")
    with pytest.raises(MoextendError, match=r"answers\.jsonl:1: an answer of model 'm', not of 'n'"):
        opened(tmp_path, path, model_id="n")
    pope(tmp_path, [line(0, text="Another?\nAnswer")])
    with pytest.raises(MoextendError, match="asked with another prompt"):
        opened(tmp_path, path)


def test_mistakes_of_an_answers_file(tmp_path: Path):
    pope(tmp_path)
    questions, path = table.read("pope", tmp_path), tmp_path / "answers.jsonl"
    said = {"question_id": 0, "prompt": "Q0?\nAnswer", "text": "No"}

    def complaint(*lines: Any) -> str:
        encoded = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
        path.write_bytes(b"\n".join(encoded) + b"\n")
        with pytest.raises(MoextendError) as caught:
            table.read_answered("pope", path, questions=questions)
        return str(caught.value)

    assert f"{path}:2: question 0 is answered a second time" in complaint(said, said)
    assert f"{path}:1: no such question: 17" in complaint(said | {"question_id": 17})
    assert f"{path}:1: no such question: '0'" in complaint(said | {"question_id": "0"})
    assert f"{path}:1: no field 'text'" in complaint({"question_id": 0, "prompt": ""})
    assert f"{path}:1: field 'text' is not text" in complaint(said | {"text": 5})
    assert f"{path}:2: not JSON" in complaint(said, b'{"question_id": 1, "pro', said | {"question_id": 2})
    assert f"{path}:1: the key 'text' stands twice" in complaint(b'{"text": "yes", "text": "no"}')
    assert f"{path}:1: byte 10 of the line is not UTF-8" in complaint(b'{"text":"\xff')
    unanswered = complaint(said)
    assert "llava_pope_test.jsonl:2: question 1 has no answer in" in unanswered and "and 1 more" in unanswered
    assert "question 0 has no answer" in complaint(b"")


# --- questions --------------------------------------------------------------------------------------------------------


def test_mistakes_of_a_question_file_are_named_by_line(tmp_path: Path):
    path = pope(tmp_path)

    def complaint(*lines: Any) -> str:
        path.write_bytes(b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines))
        with pytest.raises(MoextendError) as caught:
            table.read("pope", tmp_path)
        return str(caught.value)

    assert f"{path}:3: the same question as {path}:1 (id 0)" in complaint(line(0), line(1), line(0))
    assert f"{path}:2: byte 13 of the line is not UTF-8" in complaint(line(0), '{"text": "Grüße"}'.encode("latin-1"))
    assert f"{path}:1: byte 1 of the line is not UTF-8" in complaint(json.dumps(line(0)).encode("utf-16"))
    assert f"{path}:2: not JSON" in complaint(line(0), b'{"question_id": 1')
    assert f"{path}:1: not a JSON object" in complaint([line(0)])
    assert f"{path}:2: no field 'image'" in complaint(line(0), {"question_id": 1, "text": "Q?"})
    assert "field 'question_id' is not text or a whole number" in complaint(line(0, question_id=None))
    assert "field 'image' is not text" in complaint(line(0, image=["a.jpg"]))
    assert "holds no questions" in complaint()
    many = complaint(*[{"n": n} for n in range(10)])
    assert many.count(str(path)) == 3 and "and 27 more" in many  # three fields are lacking on each of ten lines
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line(0)).encode() + b"\r\n\r\n")  # a byte order mark is no mistake
    assert len(table.read("pope", tmp_path)) == 1


def test_missing_images_are_named_by_line(tmp_path: Path):
    path = pope(tmp_path)
    images = tmp_path / "pope" / "val2014"
    images.mkdir()
    for n in (0, 1, 3, 4):
        (images / f"{n}.jpg").write_bytes(b"picture")
    questions = table.read("pope", tmp_path)
    with pytest.raises(MoextendError) as caught:
        check_images(questions)
    assert str(caught.value).startswith(f"{path}:3: no image {images / '2.jpg'}. Download")
    (images / "2.jpg").write_bytes(b"picture")
    check_images(questions)
    assert image_bytes(questions[2]) == b"picture"
    without = Question(question_id=1, text="Q", image=None, where="here", key=(1,))
    check_images([without])
    assert image_bytes(without) is None


def test_mistakes_of_other_files_are_named_by_line(tmp_path: Path):
    def complaint(name: str, file: str, content: str | bytes, split: str | None = None) -> str:
        path = tmp_path / file
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(MoextendError) as caught:
            table.read(name, tmp_path, split)
        return str(caught.value).replace(str(path), "FILE")

    sqa = "llava_test_CQM-A.json"
    good = {"id": "1", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]}
    listed = json.dumps([good, good | {"id": "2", "conversations": []}], indent=2)
    assert complaint("scienceqa", sqa, listed).startswith("FILE:15: its conversation is not a question and a letter")
    assert "FILE:15: the same question as FILE:2" in complaint("scienceqa", sqa, json.dumps([good, good], indent=2))
    assert complaint("scienceqa", sqa, '[{"id": 1}\n{]').startswith("FILE:2: not JSON")
    assert complaint("scienceqa", sqa, '[{"id": 1, "id": 2}]').startswith("FILE: the key 'id' stands twice")
    assert complaint("scienceqa", sqa, b'[\n\n"\xff"]').startswith("FILE:3: not UTF-8")
    assert complaint("scienceqa", sqa, "[\n3]").startswith("FILE:2: not an object")
    assert "is not a list" in complaint("scienceqa", sqa, "{}")
    tsv, head = "mmbench_dev_20230712.tsv", "index\tquestion\thint\tA\tB\tC\tD\timage\n"
    assert "FILE:2: no column hint, image" in complaint("mmbench", tsv, "index\tquestion\tA\tB\tC\tD\n1\tQ\ta\tb\t\t\n")
    assert "FILE:2: index 'x' is not" in complaint("mmbench", tsv, head + "x\tQ\t\ta\tb\t\t\taGk=\n")
    assert "FILE:2: the image is not base64" in complaint("mmbench", tsv, head + '1\t"Q\n?"\t\ta\tb\t\t\t!!\n')
    assert "FILE:2: no image" in complaint("mmbench", tsv, head + "1\tQ\t\ta\tb\t\t\t\n")
    assert "FILE:2: its image is that of row 7" in complaint("mmbench", tsv, head + "1\tQ\t\ta\tb\t\t\t7\n")
    assert "FILE:2: 9 cells" in complaint("mmbench", tsv, head + "1\tQ\t\ta\tb\t\t\taGk=\tx\n")
    twice = head + 2 * "1\tQ\t\ta\tb\t\t\taGk=\n"
    assert "FILE:3: the same question as FILE:2" in complaint("mmbench", tsv, twice)
    assert "FILE:2: byte 3" in complaint("mmbench", tsv, head.encode() + b"1\t\xff\t\ta\tb\t\t\taGk=\n")
    vqa = "v2_OpenEnded_mscoco_val2014_questions.json"
    assert 'is not {"questions": [...]}' in complaint("vqav2", vqa, "[]", "val")
    assert "questions[0]: no field 'image_id'" in complaint(
        "vqav2", vqa, '{"questions": [{"question_id": 1, "question": "Q"}]}', "val"
    )
    val = json.dumps([{"image": "a.jpg", "question": "Q?", "answer_type": "other", "answers": [{"answer": 5}]}])
    assert "FILE:1: field 'answers' is not" in complaint("vizwiz", "val.json", val, "val")
    text = json.dumps({"question_id": "a", "image": "a.jpg", "text": "no line break"})
    assert "FILE:1: its prompt is not" in complaint("textvqa", "llava_textvqa_val_v051_ocr.jsonl", text)


def test_names_splits_and_folders_that_are_not_there(tmp_path: Path):
    with pytest.raises(MoextendError, match="there is no benchmark 'seed'; there are vqav2"):
        table.read("seed", tmp_path)
    with pytest.raises(MoextendError, match="POPE has no split 'val'; there are test"):
        table.read("pope", tmp_path, "val")
    with pytest.raises(MoextendError, match="POPE needs the folder"):
        table.read("pope", None)
    with pytest.raises(MoextendError, match="no folder"):
        table.read("pope", tmp_path / "absent")


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    return cli.call(["eval", "score", *(str(argument) for argument in arguments)])


def test_score_prints_a_table_and_writes_submissions(tmp_path: Path, capsys):
    pope(tmp_path)
    path = tmp_path / "answers.jsonl"
    with opened(tmp_path, path) as some:
        for question in table.read("pope", tmp_path)[:4]:
            some.append(question, "No")
    with pytest.raises(MoextendError, match=r"jsonl:5: question 4 has no answer"):
        command("--benchmark", "pope", "--data", tmp_path, "--answers", path)
    assert command("--benchmark", "pope", "--data", tmp_path, "--answers", path, "--partial") == 0
    printed = capsys.readouterr().out
    assert "POPE: 4 of 5 questions answered" in printed and "published: MoExtend 85.5" in printed
    with pytest.raises(MoextendError, match="POPE has no file to submit"):
        command("--benchmark", "pope", "--data", tmp_path, "--answers", path, "--partial", "--submission", path)
    asked = {"question_id": 0, "image": "v1_0.png", "text": "x?"}
    (tmp_path / "llava-mm-vet.jsonl").write_text(json.dumps(asked))
    path.write_text(json.dumps({"question_id": 0, "prompt": "x?", "text": "5"}))
    sent = tmp_path / "sent.json"
    arguments = ("--benchmark", "mmvet", "--data", tmp_path, "--answers", path, "--submission", sent)
    assert command(*arguments, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["headline"] is None and record["submission"] == str(sent) and "GPT-4" in record["notes"][0]
    assert json.loads(sent.read_text()) == {"v1_0": "5"}
    assert command(*arguments) == 0
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(MoextendError, match="--benchmark"):
        command("--answers", path)


def test_what_a_file_calls_its_groups_is_printed_as_it_is(tmp_path: Path, capsys):
    """Rich takes [/x] for the end of a style that never began, and a terminal an escape for an order."""
    benchmark_files.everything(tmp_path)
    benchmark_files.answer(tmp_path, "vqav2", "val")
    labels = tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"
    labels.write_text(labels.read_text().replace('"other"', r'"[/x] \u001b[2J"'))
    said = tmp_path / "answers.jsonl"
    assert command("--benchmark", "vqav2", "--split", "val", "--answers", said, "--data", tmp_path) == 0
    assert r"[/x] \x1b[2J" in capsys.readouterr().out


def test_no_jax_is_needed():
    program = "import sys; from moextend_jax.evaluate.benchmarks import command; sys.exit('jax' in sys.modules)"
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)

"""Scorers of the benchmarks: published results of LLaVA-1.5-13B reproduced, odd rules on cases worked out by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moextend_jax import cli
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmark import read_exam
from moextend_jax.evaluate.benchmarks import gqa, mcub, mmbench, mme, pope, scienceqa, table, textvqa
from moextend_jax.evaluate.benchmarks.question import Answered, Question
from moextend_jax.evaluate.benchmarks.scores import Scores
from moextend_jax.evaluate.benchmarks.vqa_text import agreement, normalise, normalise_m4c, vqa_accuracy
from moextend_jax.evaluate.wordings import worded


@pytest.fixture(scope="session")
def llava_eval(shared: Path) -> Path:
    if not (shared / "llava_eval").is_dir():
        pytest.skip(f"no published answers: {shared / 'llava_eval'} is absent")
    return shared / "llava_eval"


def answer_all(name: str, folder: Path, texts: list[str], split: str | None = None) -> list[Answered]:
    questions = table.read(name, folder, split)
    return [Answered(question, text) for question, text in zip(questions, texts, strict=True)]


def scored(name: str, folder: Path, texts: list[str], split: str | None = None) -> Scores:
    return table.score(name, answer_all(name, folder, texts, split), folder, split)


def json_lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def json_file(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def row(scores: Scores, first: str) -> dict[str, Any]:
    found = [dict(zip(scores.columns, cells, strict=True)) for cells in scores.rows if cells[0] == first]
    assert len(found) == 1, scores.rows
    return found[0]


# --- published results ------------------------------------------------------------------------------------------------


def test_pope_is_the_published_result(llava_eval: Path, capsys):
    answers = llava_eval / "pope" / "answers_llava-v1.5-13b.jsonl"
    assert (
        cli.call(
            ["eval", "score", "--benchmark", "pope", "--data", str(llava_eval), "--answers", str(answers), "--json"]
        )
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    f1 = {of["split"]: f"{of['F1 %'] / 100:.4f}" for of in printed["rows"]}
    assert f1 == {"adversarial": "0.8446", "popular": "0.8625", "random": "0.8714", "mean": "0.8595"}
    assert printed["answered"] == printed["questions"] == 8910
    assert printed["headline"]["name"] == "mean F1" and f"{printed['headline']['value']:.2f}" == "85.95"


def test_scienceqa_is_the_published_result(llava_eval: Path):
    result = json.loads((llava_eval / "scienceqa" / "llava-v1.5-13b_result.json").read_text())
    questions = table.read("scienceqa", llava_eval)
    answered = [Answered(question, result["outputs"][str(question.question_id)]) for question in questions]
    scores = table.score("scienceqa", answered, llava_eval)
    assert row(scores, "all") == {"questions of": "all", "questions": result["count"], "accuracy %": result["acc"]}
    assert f"{row(scores, 'all')['accuracy %']:.3f}" == "74.393"
    assert f"{row(scores, 'image')['accuracy %']:.2f}" == "71.64" and row(scores, "image")["questions"] == 2017
    # Question by question: the file has the number of the choice that was read, -1 where none was.
    right = [
        float(result["results"][str(question.question_id)] == "ABCDE".index(question.answer or ""))
        for question in questions
    ]
    assert list(scores.points) == right and sum(right) == result["correct"]


def test_llavas_own_scienceqa_line_answers_our_question(llava_eval: Path):
    line = json.loads((llava_eval / "scienceqa" / "llava-v1.5-13b.jsonl").read_text())
    asked = {question.question_id: question for question in table.read("scienceqa", llava_eval)}
    assert asked[line["question_id"]].recorded == line["prompt"]


# --- VQA accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Red Ball", "red ball"),  # articles, case, spaces
        ("a", ""),
        ("None", "0"),
        ("two dogs and TEN cats", "2 dogs and 10 cats"),
        ("twenty", "twenty"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes lacking are beyond the list
        ("well", "well"),
        ("somebody'd", "somebodyd"),  # the list's own slip
        ("t-shirt", "t shirt"),
        ("red - blue", "red blue"),
        ("red-blue and red - blue", "redblue and red blue"),  # beside a space once: gone everywhere
        ("1,000-ton", "1000ton"),  # a comma between digits: every mark goes without a trace
        ("1, 000", "1 000"),
        ("no.", "no"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("3.", "3"),
        ("e.g. this", "eg this"),
        ("." * 40, "." * 8),  # only the first 32 full stops
        ("10:30", "10:30"),  # a colon is no mark
        ("yes!", "yes"),
        ("what's", "what's"),
        ("\n a\tball ", "ball"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text: str, plain: str):
    assert normalise(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("what's", "what 's"),  # M4C sets 's apart first
        ("1,000-ton", "1000 ton"),  # its commas go first, so that the dash becomes a space
        ("Coca-Cola?", "coca cola"),
        ("10% OFF", "10% off"),
        ("THE END.", "end"),
        ("3.5%", "3.5%"),
    ],
)
def test_m4c_normalisation(text: str, plain: str):
    assert normalise_m4c(text) == plain


@pytest.mark.parametrize(("same", "share"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_agreement_leaves_out_each_person_in_turn(same: int, share: float):
    people = ["dog"] * same + ["cat"] * (10 - same)
    assert agreement("dog", people) == pytest.approx(share)
    # The definition: for each person left out, how many of the nine others agree.
    others = [people[:n] + people[n + 1 :] for n in range(10)]
    assert agreement("dog", people) == pytest.approx(sum(min(1, nine.count("dog") / 3) for nine in others) / 10)


def test_people_who_agree_are_not_normalised():
    assert vqa_accuracy("2", ["two"] * 10) == 0.0
    assert vqa_accuracy("two", ["two"] * 10) == 1.0
    assert vqa_accuracy("2", ["two"] * 9 + ["three"]) == 1.0
    assert vqa_accuracy("The dog.", ["dog"] * 5 + ["a dog"] * 5) == 1.0
    assert vqa_accuracy("", ["dog"] * 9 + ["cat"]) == 0.0
    assert vqa_accuracy("", ["a"] * 5 + ["dog"] * 5) == 1.0  # "a" is the empty answer


def vqav2_val(folder: Path) -> Path:
    home = folder / "vqav2"
    asked = [(1, "Is it?"), (2, "How many?"), (3, "What?")]
    questions = [{"question_id": n, "image_id": 42, "question": text} for n, text in asked]
    json_file(home / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    people = [["yes"] * 10, ["2"] * 2 + ["3"] * 8, ["tee shirt"] * 3 + ["t-shirt"] * 3 + ["shirt"] * 4]
    labels = [
        {
            "question_id": n + 1,
            "answer_type": kind,
            "answers": [{"answer": one, "answer_id": i} for i, one in enumerate(said)],
        }
        for n, (kind, said) in enumerate(zip(("yes/no", "number", "other"), people, strict=True))
    ]
    json_file(home / "v2_mscoco_val2014_annotations.json", {"annotations": labels})
    return home


def test_vqav2_by_type_of_answer(tmp_path: Path):
    vqav2_val(tmp_path)
    scores = scored("vqav2", tmp_path, ["Yes.", "two", "T-shirt"], "val")
    # "Yes." is normalised as for the server, 2 of 10 said two, 3 of 10 the shirt with a dash (now a space).
    assert [row(scores, kind)["accuracy %"] for kind in ("yes/no", "number", "other")] == pytest.approx([100, 60, 90])
    assert scores.headline is not None and scores.headline.value == pytest.approx(250 / 3)
    assert scored("vqav2", tmp_path, ["Yes, it is", "", "shirts"], "val").points == pytest.approx([0, 0, 0])
    asked = table.read("vqav2", tmp_path, "val")[0]
    assert asked.text == "Is it?\nAnswer the question using a single word or phrase."
    assert asked.image == tmp_path / "vqav2" / "val2014" / "COCO_val2014_000000000042.jpg"


def test_vqav2_goes_to_the_server_as_a_whole(tmp_path: Path):
    line = {"image": "x.jpg", "text": "Is it?\nAnswer the question using a single word or phrase."}
    dev = [line | {"question_id": n} for n in (2, 3)]
    json_lines(tmp_path / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", dev)
    whole = [line | {"question_id": n} for n in (1, 2, 3)]
    json_lines(tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", whole)
    answered = answer_all("vqav2", tmp_path, ["Yes.", "Three dogs"])
    expected = [(1, ""), (2, "yes"), (3, "3 dogs")]
    sent = json.loads(table.submission("vqav2", answered, tmp_path))
    assert [(one["question_id"], one["answer"]) for one in sent] == expected
    scores = table.score("vqav2", answered, tmp_path)
    assert scores.headline is None and "--submission" in scores.notes[0]


def test_vizwiz(tmp_path: Path):
    people = [
        {"answer": said, "answer_confidence": "yes"} for said in ["unanswerable"] * 2 + ["Pepsi."] * 4 + ["pepsi"] * 4
    ]
    entry = {"image": "v.jpg", "question": "What is this?", "answer_type": "other", "answers": people}
    json_file(tmp_path / "vizwiz" / "val.json", [entry, entry | {"image": "w.jpg"}])
    scores = scored("vizwiz", tmp_path, ["Unanswerable", "Pepsi."], "val")
    # The people's "Pepsi." stays as it is and equals no normalised answer.
    assert scores.points == pytest.approx([0.6, 1.0])
    asked = table.read("vizwiz", tmp_path, "val")[0]
    assert asked.text.split("\n")[1] == "When the provided information is insufficient, respond with 'Unanswerable'."
    json_lines(
        tmp_path / "vizwiz" / "llava_test.jsonl", [{"question_id": 7, "image": "t.jpg", "text": "What?\nAnswer"}]
    )
    sent = table.submission("vizwiz", answer_all("vizwiz", tmp_path, ["A Can."]), tmp_path)
    assert json.loads(sent) == [{"image": "t.jpg", "answer": "can"}]


# --- exact match ------------------------------------------------------------------------------------------------------


def test_gqa(tmp_path: Path):
    home = tmp_path / "gqa"
    asked = [{"question_id": str(n), "image": f"{n}.jpg", "text": "Q?\nAnswer"} for n in range(5)]
    json_lines(home / "llava_gqa_testdev_balanced.jsonl", asked)
    verify = {"structural": "verify", "semantic": "attr"}
    query = {"structural": "query", "semantic": "obj"}
    labels = {
        "0": {"answer": "yes", "isBalanced": True, "types": verify},
        "1": {"answer": "yes", "isBalanced": True, "types": verify},
        "2": {"answer": "yes", "isBalanced": False, "types": verify},
        "3": {"answer": "table", "isBalanced": True, "types": query},
        "4": {"answer": "no", "isBalanced": True, "types": verify},
    }
    json_file(home / "data" / "testdev_balanced_questions.json", labels)
    scores = scored("gqa", tmp_path, ["Yes.", "Yes, it is", "no", "TABLE..", ""])
    assert list(scores.points) == [1, 0, 0, 1, 0]
    assert [row(scores, kind)["accuracy %"] for kind in ("binary", "open", "all")] == pytest.approx([100 / 3, 100, 50])
    assert gqa.converted(" yes.") == " yes"  # LLaVA's conversion leaves spaces, GQA's script then finds them unequal
    sent = json.loads(table.submission("gqa", answer_all("gqa", tmp_path, ["Yes."] * 5), tmp_path))
    assert sent[0] == {"questionId": "0", "prediction": "yes"}


def test_easy_vqa_is_scored_as_the_demo_is():
    from moextend_jax.evaluate import questions as asking

    draw = random.Random(0)
    questions = table.read("easy_vqa", None)
    assert len(questions) == 9673 and questions[0].question_id == "test/0/0"
    some = draw.sample(questions, 200)
    answered = []
    for question in some:
        said = draw.choice([question.answer or "", "yes", "no.", "", "blue"])
        answered.append(Answered(question, draw.choice([said, said.upper(), f" {said}. ", f"{said}, it is"])))
    scores = table.score("easy_vqa", answered, None)
    assert scores.headline is not None and 0 < scores.headline.value < 100
    assert scores.headline.value / 100 == asking.accuracy(
        [question.answer or "" for question in some], [text for _, text in answered]
    )
    assert asking.are_right(["yes", "yes"], ["Yes.", "Yes, it is"]) == [True, False]


# --- multiple choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B. apostrophe", "B"),
        ("B.", None),  # neither bare nor followed by a space
        ("B ", None),
        ("b", None),
        ("F", None),
        ("The answer is B.", "B"),
        ("The answer is B", None),  # something must follow
        ("The answer is B, because", "B"),
        ("The answer is Blue", "B"),
        ("The answer is A. The answer is B.", None),  # two
        ("The answer is Z.", None),
        ("A is a complete sentence.", None),
        ("Yes", None),
        ("", None),
    ],
)
def test_scienceqa_letters(text: str, letter: str | None):
    assert scienceqa.letter(text) == letter


def test_scienceqa_by_subject(tmp_path: Path):
    entries, problems = [], {}
    kinds = [("natural science", "grade2", "", None), ("natural science", "grade7", "hint", "image.png")]
    kinds += [("language science", "grade12", "hint", None), ("social science", "grade6", "", "image.png")]
    for n, (subject, grade, hint, image) in enumerate(kinds):
        said = [{"from": "human", "value": "<image>\nQ?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
        entries.append({"id": str(n), "conversations": said} | ({"image": f"{n}/image.png"} if image else {}))
        problems[str(n)] = {"subject": subject, "grade": grade, "hint": hint, "image": image}
    json_file(tmp_path / "scienceqa" / "llava_test_CQM-A.json", entries)
    json_file(tmp_path / "scienceqa" / "problems.json", problems)
    scores = scored("scienceqa", tmp_path, ["A", "B", "", "A. x"])
    shares = {cells[0]: cells[1:] for cells in scores.rows}
    assert shares == {
        "NAT": (2, 50.0), "SOC": (1, 100.0), "LAN": (1, 0.0), "TXT": (2, 0.0), "IMG": (2, 50.0), "NO": (1, 100.0),
        "G1-6": (2, 100.0), "G7-12": (2, 0.0), "image": (2, 50.0), "all": (4, 50.0),
    }  # fmt: skip
    assert scores.notes == ["1 answers name no choice and count as wrong"]
    asked = table.read("scienceqa", tmp_path)[1]
    assert asked.image == tmp_path / "scienceqa" / "images" / "test" / "1" / "image.png"
    assert asked.recorded == "<image>\n" + asked.text and asked.text.startswith("Q?\nA. x\nB. y\nAnswer with the")


def mmbench_table(folder: Path, name: str = "mmbench_dev_20230712.tsv") -> Path:
    names = "index question hint A B C D answer category image source l2-category comment split"
    rows = [
        [1, "Which?", "nan", "cat", "dog", "", "", "A", "animals", "aGVsbG8=", "s", "l2", "", "dev"],
        [2, "What\tnow?", 'a "hint"', "cat", "hot dog", "dog", "N/A", "B", "food", "aGVsbG8=", "s", "l2", "", "dev"],
        [1000001, "Which?", "nan", "dog", "cat", "", "", "B", "animals", "1", "s", "l2", "", "dev"],
    ]
    lines = [names.replace(" ", "\t")]
    for cells in rows:
        quoted = (
            '"' + str(cell).replace('"', '""') + '"' if "\t" in str(cell) or '"' in str(cell) else str(cell)
            for cell in cells
        )
        lines.append("\t".join(quoted))
    path = folder / "mmbench" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mmbench_counts_questions_right_in_all_rotations(tmp_path: Path):
    mmbench_table(tmp_path)
    questions = table.read("mmbench", tmp_path)
    assert questions[1].prompt == 'a "hint"\nWhat\tnow?\nA. cat\nB. hot dog\nC. dog'
    assert (
        questions[1].text == questions[1].prompt + "\nAnswer with the option's letter from the given choices directly."
    )
    assert questions[0].prompt == "Which?\nA. cat\nB. dog"
    assert [question.image for question in questions] == [b"hello"] * 3  # the last one's is that of row 1
    scores = scored("mmbench", tmp_path, ["A", "hot", "b."])
    assert list(scores.points) == [1, 1, 1] and row(scores, "all")["circular accuracy %"] == 100
    scores = scored("mmbench", tmp_path, ["A", "dog", "a."])  # "dog" is a part of two choices
    assert list(scores.points) == [1, 0, 0] and scores.headline is not None and scores.headline.value == 0
    assert "33.33" in scores.notes[0] and scores.notes[1].startswith("1 answers name no choice")
    some = [Answered(question, text) for question, text in zip(questions, ["A", "hot"], strict=False)]
    scores = table.score("mmbench", some, tmp_path)  # the first question's other rotation was not asked
    assert row(scores, "all")["questions"] == 1 and row(scores, "food")["circular accuracy %"] == 100
    assert scores.notes[-1].startswith("1 questions without all of their rotations are left out")
    assert table.score("mmbench", some[:1], tmp_path).headline is None


def test_mmbench_in_chinese_lies_in_either_folder(tmp_path: Path):
    mmbench_table(tmp_path, "mmbench_dev_cn_20231003.tsv")
    assert table.read("mmbench_cn", tmp_path)[0].text.endswith("\n请直接回答选项字母。")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b. ", None),
        ("b.", "B"),
        ("I think the answer is b.", "B"),
        ("C", "A"),  # no letter of two choices, but a part of the first
        ("red car", "A"),
        ("", None),
    ],
)
def test_mmbench_letters(text: str, letter: str | None):
    assert mmbench.letter(text, ["a red car", "a blue boat"]) == letter


def test_mmbench_submission_has_llavas_columns(tmp_path: Path):
    mmbench_table(tmp_path)
    sent = table.submission("mmbench", answer_all("mmbench", tmp_path, ["A", "B\tor C", "B"]), tmp_path).split("\n")
    assert sent[0].split("\t") == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert sent[1].split("\t") == ["1", "Which?", "cat", "dog", "", "", "A", "A", "dev"]
    assert '"B\tor C"' in sent[2] and len(sent) == 5


# --- yes or no --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("NO", True),  # not one of the three spellings
        ("No, it is not", False),
        ("There is no dog.", False),
        ("Yes. There is no dog.", True),  # only the first sentence
        ("Not at all", True),  # "Not" is not "not"
        ("No\nthere is none", True),  # words are cut at spaces alone
        ("nothing", True),
        ("", True),
    ],
)
def test_pope_reads_the_first_sentence(text: str, yes: bool):
    assert pope.says_yes(text) == yes


def test_pope_measures(tmp_path: Path):
    home = tmp_path / "pope"
    asked = [
        {"question_id": 100 + n, "image": "i.jpg", "text": f"Q{n}?\nAnswer", "category": "random"} for n in range(4)
    ]
    json_lines(home / "llava_pope_test.jsonl", asked)
    right = ("yes", "yes", "no", "no")
    labels = [{"question_id": n + 1, "image": "i.jpg", "text": f"Q{n}?", "label": right[n]} for n in range(4)]
    json_lines(home / "coco" / "coco_pope_random.json", labels)
    found = row(scored("pope", tmp_path, ["Yes", "No", "Yes", "Yes, it is"]), "random")
    measured = [found[f"{name} %"] for name in ("accuracy", "precision", "recall", "F1", "yes")]
    assert measured == pytest.approx([25, 100 / 3, 50, 40, 75])
    found = row(scored("pope", tmp_path, ["No"] * 4), "random")
    assert (found["F1 %"], found["precision %"], found["accuracy %"]) == (0, 0, 50)
    labels[1], labels[2] = labels[2], labels[1]
    json_lines(home / "coco" / "coco_pope_random.json", labels)
    with pytest.raises(
        MoextendError, match=r"coco_pope_random\.json:2: not the question of .*llava_pope_test\.jsonl:2"
    ):
        scored("pope", tmp_path, ["No"] * 4)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("NO.", "no"),
        ("Not at all", "no"),  # "no" within the first four letters
        ("Know", "no"),
        ("Eyes", "yes"),
        ("Religious", "other"),
        ("It is yes", "other"),
        ("", "other"),
    ],
)
def test_mme_reads_four_letters(text: str, verdict: str):
    assert mme.verdict(text) == verdict


def mme_files(folder: Path, tasks: dict[str, int]) -> None:
    """`tasks`: task to pictures, each with two questions, the first right with yes; labels in both layouts."""
    home, asked = folder / "MME", []
    for task, pictures in tasks.items():
        for n in range(pictures):
            inside = "images/" if task == "artwork" else ""
            name = f"{task}/{inside}{n}.v1.png" if task == "artwork" else f"{task}/{n}.png"
            texts = [f"Is it {n}?", f"Is it not {n}?"]
            asked += [
                {
                    "question_id": name,
                    "image": name,
                    "text": f"{text}\nAnswer the question using a single word or phrase.",
                    "category": task,
                }
                for text in texts
            ]
            beside = home / "MME_Benchmark_release_version" / task / ("questions_answers_YN" if inside else "")
            beside.mkdir(parents=True, exist_ok=True)
            (beside.parent / "images").mkdir(exist_ok=True) if inside else None
            # One and two spaces before the instruction, as the released files have it.
            (beside / f"{n}.txt").write_text(
                f"{texts[0]} Please answer yes or no.\tYes\n{texts[1]}  Please answer yes or no.\tNo\n"
            )
    json_lines(home / "llava_mme.jsonl", asked)


def test_mme_accuracy_and_accuracy_plus(tmp_path: Path):
    mme_files(tmp_path, {"existence": 2, "artwork": 1, "code_reasoning": 1})
    scores = scored("mme", tmp_path, ["Yes", "no", "Yes", "Yes", "Nope", "No", "Maybe", "No."])
    existence = row(scores, "existence")
    assert [existence[name] for name in ("accuracy %", "accuracy+ %", "score")] == [75, 50, 125]
    assert [row(scores, task)["score"] for task in ("artwork", "code_reasoning")] == [50, 50]
    assert [row(scores, total)["score"] for total in ("perception", "cognition", "total")] == [175, 50, 225]
    assert scores.headline is None and scores.notes[0].startswith("no questions of count, position, color")
    assert scores.notes[1].startswith("1 answers are neither yes nor no")


def test_mme_prints_perception_when_all_of_it_is_there(tmp_path: Path):
    mme_files(tmp_path, dict.fromkeys((*mme.PERCEPTION, *mme.COGNITION), 1))
    scores = scored("mme", tmp_path, ["Yes", "No"] * 14)
    assert scores.headline == ("perception", 2000) and row(scores, "cognition")["score"] == 800
    assert row(scores, "total")["score"] == 2800 and not scores.notes


def test_a_wording_is_scored_as_the_question_that_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mme_files(tmp_path, dict.fromkeys((*mme.PERCEPTION, *mme.COGNITION), 1))
    monkeypatch.setattr("moextend_jax.evaluate.benchmark.check_images", lambda _: None)
    exam = read_exam("mme", data=tmp_path)
    asked = worded(exam, "Look closely. {question}").questions
    answered = [Answered(question, ("Yes", "No")[n % 2]) for n, question in enumerate(asked)]
    assert asked[0].text.startswith("Look closely. ") and exam.has_score
    assert table.score("mme", answered, tmp_path).headline == ("perception", 2000)
    assert not read_exam("mme", data=tmp_path, limit=4).has_score  # of two tasks alone there is none


# --- TextVQA, free answers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "What Brand?\nReference OCR token: A, B\nAnswer the question using a single word or phrase.",
        "Reference OCR token: A, B\nWhat Brand?\nAnswer the question using a single word or phrase.",
        "What Brand?\nAnswer the question using a single word or phrase.",
        "OCR tokens: A B. Question: What Brand? Short answer:",
    ],
)
def test_textvqa_finds_the_question_in_each_of_llavas_prompts(prompt: str):
    assert textvqa.question_of(prompt) == "what brand?"


def test_textvqa(tmp_path: Path):
    home = tmp_path / "textvqa"
    tail = "\nReference OCR token: A\nAnswer the question using a single word or phrase."
    asked = [{"question_id": "im1", "image": "im1.jpg", "text": text + tail} for text in ("What BRAND?", "How old?")]
    asked.append(asked[1])  # the same question of the same picture, which the official file may hold
    json_lines(home / "llava_textvqa_val_v051_ocr.jsonl", asked)
    people = [["Coca-Cola"] * 3 + ["coca cola"] * 3 + ["coke"] * 4, ["10 years"] * 2 + ["ten years"] + ["10"] * 7]
    data = [
        {"image_id": "im1", "question": text, "answers": said}
        for text, said in zip(("What brand?", "How old?"), people, strict=True)
    ]
    json_file(home / "TextVQA_0.5.1_val.json", {"data": data})
    scores = scored("textvqa", tmp_path, ["COCA-COLA.", "Ten years", ""])
    assert scores.points == pytest.approx([1.0, 0.9, 0.0])
    assert scores.headline is not None and scores.headline.value == pytest.approx(190 / 3)
    json_file(home / "TextVQA_0.5.1_val.json", {"data": [data[0] | {"answers": ["one"] * 9}]})
    with pytest.raises(MoextendError, match=r"data\[0\]: 'answers' is not 10 texts"):
        scored("textvqa", tmp_path, ["", "", ""])


def test_free_answers_are_written_for_their_judges(tmp_path: Path):
    json_lines(tmp_path / "mmvet" / "llava-mm-vet.jsonl", [{"question_id": 0, "image": "v1_0.png", "text": "x?"}])
    answered = answer_all("mmvet", tmp_path, ["x = 5"])
    assert json.loads(table.submission("mmvet", answered, tmp_path)) == {"v1_0": "x = 5"}
    assert table.score("mmvet", answered, tmp_path).headline is None
    home = tmp_path / "llava-bench-in-the-wild"
    json_lines(home / "questions.jsonl", [{"question_id": 0, "image": "001.jpg", "text": "Who?", "category": "conv"}])
    scores = scored("llava_bench", tmp_path, ["He."])
    assert scores.headline is None and "GPT-4" in scores.notes[0]
    with pytest.raises(MoextendError, match="no file to submit"):
        table.submission("llava_bench", answer_all("llava_bench", tmp_path, ["He."]), tmp_path)


# --- MCUB -------------------------------------------------------------------------------------------------------------

MCUB_ANSWERS = {  # text, the right letter, by the released rule, by the careful one
    "begins with it": ("A. Presence of a dog", "A", True, True),
    "bare": ("B", "B", True, True),
    "in a sentence": ("The answer is C.", "C", False, True),
    "small": ("d", "D", False, True),
    "begins like it": ("All of them are animals", "A", True, False),
    "article": ("A dog, a cat and a bird are seen. A picture shows them.", "A", True, False),
    "article, then the letter": ("A dog is in all of them: (B)", "B", False, True),
    "two": ("A, B and C", "A", True, False),
    "two others": ("Either B or C", "B", False, False),
    "subject": ("A is the answer", "A", True, True),
    "vitamin": ("vitamin B-12, so D", "D", False, True),
    "empty": ("", "C", False, False),
}  # fmt: skip


@pytest.mark.parametrize("case", MCUB_ANSWERS)
def test_mcubs_two_rules(case: str):
    text, letter, by_released, by_careful = MCUB_ANSWERS[case]
    assert (mcub.released(text, letter), mcub.careful(text, letter)) == (by_released, by_careful)


def mcub_files(folder: Path, letters: dict[str | int, str], *, split: str = "4") -> Path:
    asked = [
        {
            "id": of,
            "conversations": [{"from": "human", "value": f"<image>\n<audio>\nWhat is common? {of}"}],
            "modal_inputs": {"vision": ["a.jpg"], "audio": ["a.wav"]},
        }
        for of in letters
    ]
    right = [
        {"id": of, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": letter}]}
        for of, letter in letters.items()
        if letter
    ]
    json_file(folder / "mcub" / f"MCUB-{split}.json", asked)
    json_file(folder / "mcub" / "MCUB-answer.json", right)
    return folder


@pytest.mark.parametrize("split", ["4", "3-image-audio-pointcloud"])
def test_mcub_scores_files_of_answers(tmp_path: Path, capsys, split: str):
    mcub_files(tmp_path, {1: "A", "two": "B", 3: "C", 4: ""}, split=split)
    texts = {1: "All of them", "two": "b", 3: "C", 4: "A", "nobody's": "A", 99: "B"}
    entries = [{"question_id": of, "prompt": "?", "text": text, "model_id": "m"} for of, text in texts.items()]
    answers = json_lines(tmp_path / "answers.jsonl", entries)
    line = ["eval", "score", "--benchmark", "mcub", "--data", str(tmp_path), "--answers", str(answers)]
    assert cli.call([*line, "--split", split, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["rows"] == [
        {"rule": "released", "answers": 6, "right": 2, "accuracy %": pytest.approx(100 / 3)},
        {"rule": "careful", "answers": 6, "right": 2, "accuracy %": pytest.approx(100 / 3)},
    ]
    assert printed["headline"] == {"name": "accuracy, released rule", "value": pytest.approx(100 / 3)}
    assert (printed["questions"], printed["answered"]) == (4, 4)
    assert printed["notes"] == ["3 answers have an id without a right answer and count as wrong"]
    json_lines(answers, entries[1:])
    with pytest.raises(MoextendError, match="question 1 has no answer"):
        cli.call([*line, "--split", split])


def test_mcubs_files_are_not_trusted(tmp_path: Path):
    home = mcub_files(tmp_path, {1: "A"}) / "mcub"
    json_file(home / "MCUB-answer.json", [{"id": 1, "conversations": [{"value": "the first"}]}])
    with pytest.raises(MoextendError, match=r"MCUB-answer\.json:1: its last turn is 'the first', not a letter"):
        table.read("mcub", tmp_path)
    json_file(home / "MCUB-answer.json", [{"id": 1, "conversations": [{"value": "A"}]}])
    for broken in ([], [3], [{"from": "human"}], [{"value": 3}], "text"):
        json_file(home / "MCUB-4.json", [{"id": 1, "conversations": broken}])
        with pytest.raises(MoextendError, match=r"MCUB-4\.json:1: "):
            table.read("mcub", tmp_path)


def test_mcub_is_not_asked(tmp_path: Path):
    mcub_files(tmp_path, {1: "A"})
    with pytest.raises(MoextendError, match="MCUB is not asked here; `moextend eval score --benchmark mcub`"):
        read_exam("mcub", data=tmp_path)


def test_every_benchmark_says_where_its_files_belong(tmp_path: Path):
    for name, found in table.BENCHMARKS.items():
        if found.folders:
            for split in found.splits:
                with pytest.raises(MoextendError, match=r"no file .*docs/evaluation\.md"):
                    table.read(name, tmp_path, split)


def test_questions_are_as_in_the_official_formats(llava_eval: Path, tmp_path: Path):
    files = {
        "gqa": ("gqa", "llava_gqa_testdev_balanced.jsonl"),
        "mme": ("MME", "llava_mme.jsonl"),
        "mmvet": ("mmvet", "llava-mm-vet.jsonl"),
        "textvqa": ("textvqa", "llava_textvqa_val_v051_ocr.jsonl"),
    }
    for name, (inner, file) in files.items():
        (tmp_path / inner).mkdir()
        (tmp_path / inner / file).symlink_to(llava_eval / "formats" / file)
        questions = table.read(name, tmp_path)
        assert len(questions) == 100 and len({question.key for question in questions}) == 100
    for name in ("mme", "textvqa"):
        questions = table.read(name, tmp_path)
        said = llava_eval / "formats" / f"{name}_answers_llava-v1.5-13b.jsonl"
        answered = table.read_answered(name, said, questions=questions)
        lines = [json.loads(line) for line in said.read_text().splitlines()]
        assert [one.text for one in answered] == [line["text"] for line in lines]


def test_mmbench_prompts_are_llavas(llava_eval: Path, tmp_path: Path):
    """A table with the choices of LLaVA's first answers gives the prompts that LLaVA asked."""
    lines = (llava_eval / "formats" / "mmbench_answers_llava-v1.5-13b.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    table_lines = ["index\tquestion\thint\tA\tB\tC\tD\timage"]
    for entry in entries:
        choices = "".join(
            f"\n{one}. {option}" for one, option in zip(entry["option_char"], entry["options"], strict=True)
        )
        assert entry["prompt"].endswith(choices)
        question = entry["prompt"].removesuffix(choices).replace('"', '""')
        options = [option.replace('"', '""') for option in entry["options"]] + [""] * (4 - len(entry["options"]))
        table_lines.append("\t".join(f'"{cell}"' for cell in (entry["question_id"], question, "", *options, "aGk=")))
    (tmp_path / "mmbench_dev_20230712.tsv").write_text("\n".join(table_lines))
    questions = table.read("mmbench", tmp_path)
    assert [question.recorded for question in questions] == [entry["prompt"] for entry in entries]
    assert [mmbench.recorded(question)["options"] for question in questions] == [entry["options"] for entry in entries]


def test_question_is_what_the_runner_asks(tmp_path: Path):
    question = Question(question_id=1, text="Q?", image=None, where="here:1", key=(1, 0))
    assert question.recorded == "Q?"

"""Fine-tuning tiny encoders for real: what they can learn, where answers may be, and what the command line says."""

import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from tiny import COMMON_WORDS

from distillabse import cli
from distillabse.config.models import DenseStudentConfig, SwitchStudentConfig
from distillabse.errors import ConfigurationError, InputError
from distillabse.finetuning.comparison import finetune, finetune_folders
from distillabse.finetuning.heads import require_stock, tokenizer_of, with_head
from distillabse.finetuning.settings import finetuning_settings
from distillabse.finetuning.spans import Span, best_spans, question_windows, target_tokens
from distillabse.finetuning.tasks import TASKS
from distillabse.finetuning.training import FineTuned
from distillabse.models.student import build_student
from distillabse.models.teacher import load_encoder, transformer_of

XNLI, PAWS, XQUAD = TASKS["xnli"], TASKS["paws-x"], TASKS["xquad"]
WORDS = COMMON_WORDS.split()
FAST = ("training.learning_rate=2e-3", "dropout=0", "training.per_device_train_batch_size=18", "training.max_steps=100")
SHORT = ("max_length=48", "max_question_length=8", "doc_stride=8")


@pytest.fixture
def encoder(encoder_folder):
    return load_encoder(str(encoder_folder))


def pair_rows():
    """Only both texts together tell the class."""
    rows = [(first, second) for first in ("cat", "dog", "bird") for second in ("cat", "dog", "bird")]
    return Dataset.from_list(
        [
            {"language": language, "id": str(index), "first": f"the {a} here", "second": f"one {b}", "label": label}
            for language in ("en", "de")
            for index, (a, b) in enumerate(rows)
            for label in [(WORDS.index(a) + WORDS.index(b)) % 3]
        ]
    )


def question_rows(contexts, language="en"):
    """The word after the one that the question names is the answer."""
    rows = []
    for number, (context, asked) in enumerate(contexts):
        answer = context.split()[context.split().index(asked) + 1]
        start = context.index(f"{asked} {answer}") + len(asked) + 1
        rows.append(
            {"language": language, "id": str(number), "question": f"what {asked}", "context": context,
             "answers": [answer], "answer_start": start}
        )  # fmt: skip
    return Dataset.from_list(rows)


QUESTIONS = [
    ("the old cat and red dog will sleep", "old"),
    ("the old cat and red dog will sleep", "red"),
    ("we see one bird by water in this city", "by"),
    ("we see one bird by water in this city", "this"),
    ("good friend to eat at night", "good"),
    ("good friend to eat at night", "to"),
]


def test_pairs_are_learnt_by_heart(encoder):
    settings = finetuning_settings(XNLI, (*FAST, "max_length=16"))
    rows = pair_rows()
    found, predictions = finetune(XNLI, {"tiny": encoder}, rows, rows, settings, [1])
    model = found["models"]["tiny"]
    assert model["languages"]["en"]["accuracy"]["mean"] == 100 == model["average"]["accuracy"]
    assert [row["label"] for row in predictions["tiny"]] == [XNLI.labels[label] for label in rows["label"]]
    assert model["runs"][0]["steps"] == 100 and model["runs"][0]["rows"] == 18


def test_answers_are_learnt_by_heart_and_other_models_stand_beside(encoder, encoder_folder):
    settings = finetuning_settings(XQUAD, (*FAST, *SHORT))
    student = build_student(encoder, DenseStudentConfig(layers=2, hidden_size=16, embedding_size=8))
    rows = question_rows(QUESTIONS)
    before = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    found, predictions = finetune(XQUAD, {"teacher": encoder, "electra": student}, rows, rows, settings, [1])
    figures = found["models"]["teacher"]["languages"]["en"]
    assert figures["exact_match"]["mean"] == 100 == figures["f1"]["mean"]
    assert [row["answer"] for row in predictions["teacher"]] == ["cat", "dog", "water", "city", "friend", "eat"]
    assert type(transformer_of(student)).__name__ == "ElectraModel"
    difference = found["models"]["electra"]["languages"]["en"]["f1"]["difference"]
    assert difference["mean"] == pytest.approx(found["models"]["electra"]["average"]["f1"] - 100)
    assert all(torch.equal(weight, before[name]) for name, weight in encoder.state_dict().items())


def test_the_same_seed_gives_the_same_model_and_another_one_does_not(encoder, tmp_path):
    settings = finetuning_settings(XNLI, (*FAST, "max_length=16", "dropout=0.1", "training.max_steps=2"))
    rows = pair_rows()

    def logits(seed):
        tuned = FineTuned(encoder, XNLI, rows, settings, seed, tmp_path, "t")
        return tuned._logits(tuned._pairs(rows))

    assert np.array_equal(logits(1), logits(1))
    assert not np.allclose(logits(1), logits(2))


def test_windows_share_the_stride_and_point_to_whole_answers_only(encoder):
    # 10 words of one token each; a window has 10 - 3 special tokens - 1 of the question = 6 of them, 2 shared.
    words = "cat dog bird tree water book city street car train".split()
    context = " ".join(words)
    settings = finetuning_settings(XQUAD, ("max_length=10", "max_question_length=1", "doc_stride=2"))
    tokenizer = tokenizer_of(encoder)

    def row(answer):
        return {"language": "en", "id": answer, "question": "where", "context": context, "answers": [answer],
                "answer_start": context.index(answer)}  # fmt: skip

    rows = Dataset.from_list([row("street car"), row("water book"), row("book"), row("cat dog")])
    windows = question_windows(rows, tokenizer, settings, targets=False)
    assert windows["row"] == [0, 0, 1, 1, 2, 2, 3, 3]
    offsets = np.asarray(windows["offsets"][1])
    assert [context[start:end] for start, end in offsets[3:9]] == words[4:]
    assert (offsets[[0, 1, 2, 9]] == -1).all()
    assert tokenizer.convert_ids_to_tokens(windows["input_ids"][0]) == [
        "[CLS]", "where", "[SEP]", *words[:6], "[SEP]",
    ]  # fmt: skip
    trained = question_windows(rows, tokenizer, settings, targets=True)
    spans = list(zip(trained["start_positions"], trained["end_positions"], strict=True))
    # street car: words 7 and 8, in the second window alone. water book: 4 and 5, in both. book: 5. cat dog: 0 and 1.
    assert spans == [(0, 0), (6, 7), (7, 8), (3, 4), (8, 8), (4, 4), (3, 4), (0, 0)]


def test_an_answer_that_a_window_cuts_points_to_the_cls_token():
    offsets = np.array([[-1, -1], [10, 13], [14, 17], [18, 20], [-1, -1]])
    assert target_tokens(offsets, 14, 17, 0) == (2, 2)
    assert target_tokens(offsets, 15, 19, 0) == (2, 3)
    assert target_tokens(offsets, 9, 13, 0) == (0, 0)
    assert target_tokens(offsets, 18, 21, 0) == (0, 0)
    assert target_tokens(offsets, 13, 14, 0) == (0, 0)  # a space: no token
    assert target_tokens(offsets, -1, 3, 0) == (0, 0)


def test_long_questions_are_cut_and_contexts_are_not(encoder):
    settings = finetuning_settings(XQUAD, ("max_length=16", "max_question_length=2", "doc_stride=2"))
    rows = question_rows([(" ".join(WORDS[:30]), "of")])
    rows = rows.remove_columns("question").add_column("question", ["cat dog bird tree " * 9])
    windows = question_windows(rows, tokenizer_of(encoder), settings, targets=False)
    tokens = [tokenizer_of(encoder).convert_ids_to_tokens(ids) for ids in windows["input_ids"]]
    assert all(row[:4] == ["[CLS]", "cat", "dog", "[SEP]"] for row in tokens)
    assert {word for row in tokens for word in row[4:-1]} == set(WORDS[:30])


def test_candidates_by_hand():
    offsets = np.array([[-1, -1], [0, 3], [4, 6], [7, 9], [-1, -1]])
    start, end = np.array([9, 1, 2, 0, 9, 50.0]), np.array([9, 0, 0, 3, 9, 50.0])
    # (1,3) would have 4 but three tokens; [CLS], [SEP] and padding would have more.
    assert best_spans(start, end, offsets, 2, 3) == [Span(5, 4, 9), Span(3, 7, 9), Span(2, 4, 6)]
    assert best_spans(start, end, offsets, 3, 2) == [Span(5, 4, 9), Span(4, 0, 9)]
    assert best_spans(start, end, offsets[:1], 3, 2) == []


def test_the_best_candidate_is_the_best_of_all_pairs():
    random = np.random.default_rng(0)
    for _ in range(50):
        size, longest = int(random.integers(1, 12)), int(random.integers(1, 5))
        offsets = np.full((size + 3, 2), -1)
        offsets[2:-1] = [[5 * token, 5 * token + 4] for token in range(size)]
        start, end = random.normal(size=(2, size + 3))
        pairs = {
            (offsets[i, 0], offsets[j, 1]): start[i] + end[j]
            for i in range(2, size + 2)
            for j in range(i, min(i + longest, size + 2))
        }
        spans = best_spans(start, end, offsets, longest, 5)
        expected = sorted(pairs, key=lambda pair: -pairs[pair])[:5]
        assert [(span.start, span.end) for span in spans] == expected


def test_no_answer_is_ever_outside_of_its_context(encoder, tmp_path):
    contexts = [(" ".join(WORDS), "of"), ("älter über Straße, größer!", "über"), ("no cat (x) 12.5% of", "no")]
    rows = question_rows(contexts, "de")
    settings = finetuning_settings(
        XQUAD, ("max_length=16", "max_question_length=4", "doc_stride=4", "training.max_steps=1", "training.use_cpu=1")
    )
    tuned = FineTuned(encoder, XQUAD, rows, settings, 3, tmp_path, "t")
    predictions, scores = tuned.judged(rows)
    for row, prediction in zip(rows, predictions, strict=True):
        candidates = [candidate["answer"] for candidate in prediction["n_best"]]
        assert prediction["answer"] == candidates[0] and len(candidates) > 3
        assert all(candidate and candidate in row["context"] for candidate in candidates)
        ordered = [candidate["score"] for candidate in prediction["n_best"]]
        assert ordered == sorted(ordered, reverse=True)
    assert all(values.shape == (3,) and (0 <= values).all() and (values <= 100).all() for values in scores.values())


def test_batches_are_padded_to_their_longest_row(encoder, tmp_path):
    settings = finetuning_settings(XNLI, ("training.max_steps=1", "max_length=40"))
    tuned = FineTuned(encoder, XNLI, pair_rows(), settings, 3, tmp_path, "t")
    batch = tuned.trainer.data_collator([{"input_ids": [2, 9, 3]}, {"input_ids": [2, 9, 8, 7, 3]}])
    assert batch["input_ids"].shape == (2, 5) and batch["attention_mask"].tolist()[0] == [1, 1, 1, 0, 0]
    trained = next(iter(tuned.trainer.get_train_dataloader()))
    assert trained["input_ids"].shape[1] == int(trained["attention_mask"].sum(1).max()) < 40


def test_the_head_sits_on_the_encoders_own_weights_and_knows_the_labels(encoder):
    for task, name in ((PAWS, "BertForSequenceClassification"), (XQUAD, "BertForQuestionAnswering")):
        model = with_head(encoder, task, 0.3)
        assert type(model).__name__ == name and model.config.hidden_dropout_prob == 0.3
        own = transformer_of(encoder).state_dict()
        copied = model.base_model.state_dict()
        assert all(torch.equal(copied[key], own[key]) for key in copied)
        assert {key for key in own if key not in copied} <= {"pooler.dense.weight", "pooler.dense.bias"}
    assert with_head(encoder, PAWS, 0).config.id2label == {0: "not_paraphrase", 1: "paraphrase"}
    assert transformer_of(encoder).config.hidden_dropout_prob == 0.1


def test_segments_and_case_are_those_of_the_encoder(encoder):
    pair = ("The Cat", "A Dog")
    assert "token_type_ids" in tokenizer_of(encoder)(*pair)
    encoder[0].do_lower_case = True
    transformer_of(encoder).config.type_vocab_size = 1
    tokenizer = tokenizer_of(encoder)
    assert "token_type_ids" not in tokenizer(*pair)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(*pair)["input_ids"])
    assert tokens == ["[CLS]", "the", "cat", "[SEP]", "a", "dog", "[SEP]"]


def test_a_switch_student_and_inputs_that_are_too_long_are_refused(encoder):
    values = {"layers": 2, "experts": 2, "sparse_layers": [1]}
    switch = build_student(encoder, SwitchStudentConfig(**values))
    with pytest.raises(ConfigurationError, match=r"my/student: its encoder is a SwitchStudent.*dense"):
        require_stock(switch, XNLI, 16, "my/student")
    with pytest.raises(ConfigurationError, match="64 positions, fewer than max_length 384"):
        require_stock(encoder, XQUAD, 384, "my/teacher")


def test_questions_without_answers_in_their_contexts_are_refused(encoder):
    rows = question_rows(QUESTIONS).remove_columns("answer_start").add_column("answer_start", [-1] * 6)
    with pytest.raises(InputError, match="has its answer in its context"):
        finetune(XQUAD, {"tiny": encoder}, rows, rows, finetuning_settings(XQUAD, (*FAST, *SHORT)), [1])


def test_the_test_rows_choose_no_checkpoint(encoder):
    settings = finetuning_settings(XNLI, ("training.eval_strategy=epoch", "max_length=16"))
    with pytest.raises(ConfigurationError, match="judged once"):
        finetune(XNLI, {"tiny": encoder}, pair_rows(), pair_rows(), settings, [1])


@pytest.fixture
def table(tmp_path):
    lines = ["lang\tid\tquestion\tanswer\tcontext"]
    for language in ("en", "de"):
        for row in question_rows(QUESTIONS, language):
            lines.append("\t".join([language, row["id"], row["question"], row["answers"][0], row["context"]]))
    path = tmp_path / "questions.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def call(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distillabse", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code or 0


def test_the_command_writes_figures_and_predictions_of_all_models(
    encoder_folder, labse_folder, table, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    status = call(
        "finetune", "xquad", "-m", encoder_folder, "-m", labse_folder, "--train", table, "--held-out", "0.34",
        "--seed", "1", "--seed", "2", "-o", out, *SHORT, "training.max_steps=2", "bootstrap_samples=100",
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert status == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "encoder-2" in printed and "difference" in printed and "Few-shot split of XQuAD" in printed
    result = json.loads((out / "results.json").read_text())
    assert result["folders"] == {"encoder": str(encoder_folder), "encoder-2": str(labse_folder)}
    assert result["seeds"] == [1, 2] and result["settings"]["training"]["max_steps"] == 2
    assert result["environment"]["versions"]["transformers"]
    # One of the three paragraphs, with its two questions, in both languages; the training rows are the English others.
    assert result["data"]["train"]["rows"] == 4 and result["data"]["test"]["rows"] == 4
    for name in result["folders"]:
        rows = [json.loads(line) for line in (out / f"predictions-{name}.jsonl").read_text().splitlines()]
        assert [row["seed"] for row in rows] == [1] * 4 + [2] * 4 and {row["language"] for row in rows} == {"en", "de"}
        figures = result["models"][name]["languages"]["de"]["f1"]
        assert len(figures["seeds"]) == 2 and figures["mean"] == pytest.approx(np.mean(figures["seeds"]))
        assert result["models"][name]["runs"][1]["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("xquad",), "at least one model"),
        (("xnlu", "-m", "x"), "did you mean 'xnli'"),
        (("xquad", "-m", "{encoder}"), "max_length=64"),
        (("xquad", "-m", "{encoder}", *SHORT, "--train", "{table}", "--held-out", "0.5", "--language", "fr"), "de, en"),
        (("xquad", "-m", "{encoder}", *SHORT, "--train", "nowhere.tsv", "--held-out", "0.5"), "no file nowhere.tsv"),
    ],
)
def test_wrong_use_is_told_with_its_remedy(arguments, message, encoder_folder, table, monkeypatch, capsys):
    given = [argument.format(encoder=encoder_folder, table=table) for argument in arguments]
    assert call("finetune", *given, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_launcher_is_refused(table, encoder_folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ("finetune", "xquad", "-m", encoder_folder, "--train", table, "--held-out", "0.5")
    assert call(*given, monkeypatch=monkeypatch) == 2
    assert "without torchrun" in capsys.readouterr().err.replace("\n", " ")


def test_a_switch_folder_is_refused_before_training(encoder, encoder_folder, table, tmp_path):
    from distillabse.finetuning.comparison import DataChoice
    from distillabse.models.folder import save_encoder

    switch = build_student(encoder, SwitchStudentConfig(layers=2, experts=2, sparse_layers=[1]))
    save_encoder(switch, tmp_path / "switch")
    settings = finetuning_settings(XQUAD, SHORT)
    with pytest.raises(ConfigurationError, match="SwitchStudent"):
        finetune_folders(
            XQUAD, [str(encoder_folder), str(tmp_path / "switch")], DataChoice(train=table, held_out=0.5), settings,
            [1], tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert isinstance(SentenceTransformer(str(tmp_path / "switch"), device="cpu"), SentenceTransformer)

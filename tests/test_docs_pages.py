"""What the documentation says of files, keys, options and messages is so, and its links lead somewhere."""

import re
from typing import get_args

import pytest
import yaml
from documentation import (
    PAGES,
    ROOT,
    all_blocks,
    anchors,
    blocks,
    broken_links,
    inline_code,
    links,
    page_text,
    wrong_key,
)
from error_messages import covers, phrases, raised_messages, says_something

from distillabse.config import JobConfig, ObjectiveConfig, TaskSuite, TrainingConfig
from distillabse.pipeline import STAGES
from distillabse.settings import validate


def test_all_code_of_the_page_on_shipping_is_run_by_its_benchmark():
    scripts = [path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks" / "consumers").glob("*/*.*")]
    run = "".join(re.sub(r"\s+", "", text) for text in scripts)
    for block in blocks("docs/shipping.md"):
        if block.language in ("python", "js"):
            assert re.sub(r"\s+", "", block.text) in run, block


def test_yaml_is_a_part_of_a_valid_job_or_a_suite_of_tasks():
    whole = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    for block in all_blocks("yaml"):
        part = yaml.safe_load(block.text)
        if isinstance(part.get("tasks"), list):
            TaskSuite.model_validate(part)
        elif part.get("student", {}).get("kind") == "switch" or "objectives" not in part:
            validate({**whole, **part}, str(block))
        else:
            for objective in part["objectives"]:
                build = {"objectives": [objective]}
                TrainingConfig.model_validate(build)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_link_to_nothing_is_seen_and_headings_have_githubs_names():
    text = "# Über `x` & *y*, z!\n## Two\n## Two\n[a](#two) [b](#two-1) [c](#two-2) [d](students.md#shapes) [e](no.md)"
    assert broken_links("docs/int8.md", text) == ["#two-2", "no.md"]
    assert anchors(text) == {"über-x--y-z", "two", "two-1"}


def test_every_page_is_in_the_index():
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links("docs/README.md")}
    missing = [page for page in PAGES if page.startswith("docs/") and (ROOT / page).resolve() not in linked]
    assert missing == ["docs/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_files_of_this_repository_that_a_page_names_exist(page):
    named = [
        code for code in inline_code(page) if re.fullmatch(r"(distillabse|tests|benchmarks|configs)/[\w./*-]+", code)
    ]
    assert [code for code in named if not list(ROOT.glob(code))] == []


def test_the_page_on_design_has_every_stage_with_what_it_reads():
    rows = {cells[1].strip(" `"): cells[3] for line in page_text("docs/design.md").splitlines()
            if len(cells := line.split("|")) == 6}  # fmt: skip
    assert [name for name in STAGES if name not in rows] == []
    for name, stage in STAGES.items():
        blocks_read = {key for key in stage.reads if "." not in key}
        missing = {key for key in blocks_read if f"`{key}`" not in rows[name]}
        assert not missing, (name, missing)
    packages = {path.parent.name for path in ROOT.glob("distillabse/*/__init__.py")}
    assert [name for name in packages if f"`distillabse/{name}`" not in page_text("docs/design.md")] == []


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_a_configuration_that_a_page_names_exist(page):
    assert [(code, wrong) for code in inline_code(page) if (wrong := wrong_key_of(code))] == []


def wrong_key_of(code):
    """The wrong part of a dotted key of a job, with or without a value; None for what is no key."""
    found = re.fullmatch(r"((?:\w+\.)+\w+)(?:[=:] ?\S.*)?", code)
    if not found or found[1].split(".")[0] not in JobConfig.model_fields:
        return None
    key = found[1]
    return (
        None if (ROOT / key).exists() or key.endswith((".md", ".json", ".yaml", ".py")) else wrong_key(key, JobConfig)
    )


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("export.quantization.kind", None),
        ("export.quantization.kinds: static", "kinds"),
        ("training.learning_rate=1e-4", None),
        ("training.learning_rat=1e-4", "learning_rat"),
        ("student.initialisation: embeddings", None),
        ("student.initialization", "initialization"),
        ("objectives.minilm_v2.relation_heads", None),
        ("corpus.split.max_dev", None),
        ("report.json", None),
    ],
)
def test_wrong_keys_are_found(code, wrong):
    assert wrong_key_of(code) == wrong


def test_every_option_of_every_objective_is_explained():
    text = page_text("docs/objectives.md") + page_text("docs/pair-objectives.md")
    kinds = get_args(get_args(ObjectiveConfig)[0])
    for kind in kinds:
        assert f"`{kind.model_fields['kind'].default}`" in text
        assert [name for name in kind.model_fields if f"{name}" not in text] == [], kind


def test_every_error_message_has_its_remedy():
    messages = [message for message in raised_messages() if says_something(message)]
    assert len(messages) > 300
    known = phrases()
    assert [message for message in messages if not any(covers(phrase, message) for phrase in known)] == []
    stale = [phrase for phrase in known if not any(covers(phrase, message) for message in messages)]
    assert stale == []
    # A phrase that fits many messages would hide new ones.
    assert [phrase for phrase in known if sum(covers(phrase, message) for message in messages) > 6] == []


def test_a_message_without_a_row_and_a_row_without_a_message_are_seen(tmp_path):
    source = 'def f(x):\n    raise InputError(f"{x} is blue. " "Paint it.")\n\ndef g():\n    raise ValueError(why())\n'
    (tmp_path / "new.py").write_text(f"{source}\ndef why():\n    return 'too green'\n")
    found = raised_messages(tmp_path)
    assert [message.text for message in found] == ["… is blue. Paint it.", "too green"]
    assert covers("is blue. … it", found[0]) and not covers("is red", found[0])
    assert phrases("| `is blue`<br>`is red` | x | `y` |\n| plain | y |") == ["is blue", "is red"]

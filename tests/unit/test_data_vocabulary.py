import dataclasses
import hashlib
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dkdetr.data.annotations import Category
from dkdetr.data.prompts import PROMPT_SETS, fill_prompt, prompt_set, readable_name
from dkdetr.data.vocabulary import (
    Vocabulary,
    build_vocabulary,
    from_metadata,
    load_vocabulary,
    save_vocabulary,
    thresholds_by_name,
)
from dkdetr.data.vocabulary_check import thresholds_in_force
from dkdetr.errors import CorruptArtefactError, DataError, MismatchError, UsageError
from tests.unit.data_world import FakeTextEncoder

CATEGORIES = (
    Category(3, "acorn", "r", is_base=False),
    Category(7, "bow_(weapon)", "c", is_base=True),
    Category(9, "cat", "f", is_base=True),
)


def built(prompts=("a photo of {article} {}.", "the {}")) -> Vocabulary:
    return build_vocabulary(CATEGORIES, prompts, FakeTextEncoder())


def test_an_embedding_is_the_unit_mean_of_its_prompts_unit_vectors():
    one, two = FakeTextEncoder().encode_texts(["a photo of an acorn.", "the acorn"])
    mean = (one + two) / 2
    np.testing.assert_allclose(built().embeddings[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert built().embeddings.dtype == np.float32


def test_labels_and_ids_convert_both_ways_and_base_keeps_order():
    vocabulary = built()
    assert [vocabulary.label_of(number) for number in (3, 7, 9)] == [0, 1, 2]
    assert vocabulary.category_id_of(1) == 7
    base = vocabulary.base()
    assert base.names == ("bow_(weapon)", "cat")
    assert base.label_of(9) == 1
    np.testing.assert_array_equal(base.embeddings, vocabulary.embeddings[1:])
    with pytest.raises(DataError, match="id 3"):
        base.label_of(3)


def test_a_student_understands_its_own_teacher_s_embeddings_alone():
    student = built()
    built(("the {}",)).require_space_of(student, "these were")
    other = dataclasses.replace(student, teacher="another:0")
    with pytest.raises(MismatchError, match="these were embedded by another:0, the student"):
        other.require_space_of(student, "these were")
    wider = np.hstack([student.embeddings, np.zeros_like(student.embeddings)])
    with pytest.raises(MismatchError, match="though both are said to be fake:0's"):
        dataclasses.replace(student, embeddings=wider).require_space_of(student, "these were")


def test_it_survives_its_file_and_its_metadata(tmp_path):
    vocabulary = built()
    save_vocabulary(vocabulary, tmp_path / "v.safetensors")
    loaded = load_vocabulary(tmp_path / "v.safetensors")
    assert loaded.hash == vocabulary.hash
    assert loaded.metadata() == vocabulary.metadata()
    np.testing.assert_array_equal(loaded.embeddings, vocabulary.embeddings)
    through_json = json.loads(json.dumps(vocabulary.metadata()))
    assert from_metadata(through_json, vocabulary.embeddings).hash == vocabulary.hash
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def test_the_hash_moves_with_every_part():
    vocabulary = built()
    hashes = {vocabulary.hash, vocabulary.base().hash, built(("the {}",)).hash}
    for field in vocabulary.metadata():
        changed = vocabulary.metadata()
        value = changed[field]
        changed[field] = "x" if isinstance(value, str) else [*value[1:], value[0]]
        hashes.add(from_metadata(changed, vocabulary.embeddings).hash)
    hashes.add(from_metadata(vocabulary.metadata(), vocabulary.embeddings[::-1]).hash)
    assert len(hashes) == 3 + 6 + 1


def test_thresholds_travel_and_leave_the_hash_alone(tmp_path):
    plain = built()
    # What a vocabulary without thresholds hashes to, and so what a run, a cache or scores name it.
    asked = json.dumps(plain.metadata(), sort_keys=True, separators=(",", ":"))
    assert sorted(plain.metadata()) == [
        "category_ids", "frequencies", "is_base", "names", "prompts", "teacher",
    ]  # fmt: skip
    expected = hashlib.sha256(asked.encode() + plain.embeddings.tobytes()).hexdigest()
    strict = dataclasses.replace(plain, thresholds={"cat": 0.5, "acorn": 0.1})
    assert plain.hash == strict.hash == expected
    assert strict.base().thresholds == {"cat": 0.5}
    path = tmp_path / "v.vocab"
    save_vocabulary(strict, path)
    loaded = load_vocabulary(path)
    assert (loaded.thresholds, loaded.hash) == ({"cat": 0.5, "acorn": 0.1}, expected)
    through_json = json.loads(json.dumps(strict.metadata()))
    assert from_metadata(through_json, strict.embeddings).thresholds == loaded.thresholds
    # A file of before has two entries beside its rows, and is what one without thresholds is now.
    save_vocabulary(plain, path)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"vocabulary": asked, "hash": expected}
    assert load_vocabulary(path).thresholds == {}


def test_thresholds_that_were_changed_or_lost_are_damage(tmp_path):
    path = tmp_path / "v.vocab"
    strict = dataclasses.replace(built(), thresholds={"cat": 0.5})
    save_vocabulary(strict, path)
    with safe_open(path, framework="numpy") as file:
        described = file.metadata()
    for thresholds in ({"cat": 0.4}, {"acorn": 0.5}, {}, {"dog": 0.5}, {"cat": 5}, {"cat": "x"}):
        changed = json.dumps(strict.metadata() | {"thresholds": thresholds})
        save_file({"embeddings": strict.embeddings}, path, described | {"vocabulary": changed})
        with pytest.raises(CorruptArtefactError):
            load_vocabulary(path)
    del described["thresholds_hash"]
    save_file({"embeddings": strict.embeddings}, path, described)
    with pytest.raises(CorruptArtefactError, match="damaged"):
        load_vocabulary(path)


def test_thresholds_are_given_by_names_as_people_write_them():
    names = ("bow_(weapon)", "Cat", "cat")
    given = {"Bow (weapon)": 0.2, "CAT": 1}
    expected = {"bow_(weapon)": 0.2, "Cat": 1, "cat": 1}
    assert thresholds_by_name(names, given) == expected
    assert thresholds_by_name(names, {}) == {}
    with pytest.raises(UsageError, match="'dog', which is none of the names"):
        thresholds_by_name(names, {"dog": 0.5})
    for beyond in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match=r"threshold of 'cat' is .*0\.\.1"):
            thresholds_by_name(names, {"cat": beyond})


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    save_vocabulary(built(), path)
    whole = path.read_bytes()
    for place in (9, len(whole) // 2, len(whole) - 2):
        broken = bytearray(whole)
        broken[place] ^= 4
        path.write_bytes(broken)
        with pytest.raises(CorruptArtefactError):
            load_vocabulary(path)
    path.write_bytes(whole[:-5])
    with pytest.raises(CorruptArtefactError):
        load_vocabulary(path)
    save_file({"embeddings": built().embeddings}, path)
    assert load_file(path)
    with pytest.raises(CorruptArtefactError, match="not a vocabulary"):
        load_vocabulary(path)
    with pytest.raises(DataError, match="no vocabulary file"):
        load_vocabulary(tmp_path / "none")


def test_impossible_vocabularies_are_refused():
    metadata, embeddings = built().metadata(), built().embeddings
    scaled = embeddings * np.array([[3.0], [0.5], [1.0]])
    with pytest.raises(DataError, match=r"2 text embeddings.*'acorn'"):
        from_metadata(metadata, scaled)
    with pytest.raises(DataError, match="unit norm"):
        from_metadata(metadata, np.full_like(embeddings, np.nan))
    with pytest.raises(DataError, match="differ in number"):
        from_metadata(metadata, embeddings[:2])
    with pytest.raises(DataError, match="twice"):
        from_metadata(metadata | {"category_ids": [1, 1, 2]}, embeddings)
    with pytest.raises(DataError, match="teacher"):
        from_metadata({key: metadata[key] for key in metadata if key != "teacher"}, embeddings)
    with pytest.raises(DataError, match="twice: cat"):
        build_vocabulary([CATEGORIES[2]] * 2, ["{}"], FakeTextEncoder())
    with pytest.raises(UsageError, match="no place"):
        built(["a photo"])
    with pytest.raises(UsageError, match="at least one prompt"):
        built([])


def test_prompt_sets_are_of_their_published_sizes_and_name_their_source():
    sizes = {name: len(each.templates) for name, each in PROMPT_SETS.items()}
    assert sizes == {"single": 1, "clip7": 7, "vild63": 63}
    for each in PROMPT_SETS.values():
        assert each.source
        assert len(set(each.templates)) == len(each.templates)
        assert all(template.count("{}") == 1 for template in each.templates)
    assert "This is a photo of the hard to see {}." in prompt_set("vild63").templates
    assert "itap of my {}." in prompt_set("vild63").templates
    with pytest.raises(UsageError, match="vild63"):
        prompt_set("vild64")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("fire_hydrant", "It is a fire hydrant."),
        ("Apple", "It is an apple."),
        ("bow_(weapon)", "It is a bow (weapon)."),
        ("Cup/Mug", "It is a cup or mug."),
        ("Noddles ", "It is a noddles."),
    ],
)
def test_names_are_put_into_sentences(name, sentence):
    assert fill_prompt("It is {article} {}.", name) == sentence
    assert readable_name(name) in sentence


def test_a_line_names_the_least_scores_in_force_and_not_those_that_gave_way():
    plain = built()
    assert thresholds_in_force(plain, {}) == ""
    some = dataclasses.replace(plain, thresholds={"cat": 0.5, "acorn": 0.25})
    told = "least scores of the vocabulary: "
    assert thresholds_in_force(some, {}) == f"{told}acorn 0.25, cat 0.5"
    assert thresholds_in_force(some, {"Cat": 0.9}) == f"{told}acorn 0.25"
    assert thresholds_in_force(some, {"acorn": 0.1, "cat": 0.9}) == ""
    rows = np.eye(8, dtype=np.float32)
    names = tuple(f"n{number}" for number in range(8))
    many = dataclasses.replace(
        plain, names=names, category_ids=tuple(range(8)), is_base=(True,) * 8,
        frequencies=("",) * 8, embeddings=rows, thresholds=dict.fromkeys(names, 0.5),
    )  # fmt: skip
    assert thresholds_in_force(many, {}).endswith(" n3 0.5, n4 0.5 and 3 more")

"""What the notebooks share: measurements kept on disk are what would be measured again."""

import dataclasses
import json

import numpy as np
import pytest

from selfrepair.analysis import iterative
from selfrepair.run.study import Study
from selfrepair.run.verify import verify
from selfrepair.store.manifest import manifest_of

MODEL = "pocket-pythia-small"
MEASURES = {
    iterative.self_feeding: (3,),
    iterative.one_layer_earlier: ("zero", 0.05),
    iterative.head_cosines: (),
    iterative.alignment: (),
}


def study(folder):
    return Study.of(n_prompts=4, out_dir=folder)


@pytest.mark.parametrize("what", MEASURES, ids=lambda what: what.__name__)
def test_kept_measurements_are_what_was_measured(what, tmp_path, monkeypatch):
    here = study(tmp_path)
    wanted = what(*here.load(MODEL), *MEASURES[what])
    first = here.measure(what, MODEL, *MEASURES[what])
    monkeypatch.setattr(iterative, "checked_tokens", lambda *_: pytest.fail("measured again"))
    again = study(tmp_path).measure(what, MODEL, *MEASURES[what])
    for field in dataclasses.fields(wanted):
        values = [getattr(found, field.name) for found in (wanted, first, again)]
        assert len({type(value) for value in values}) == 1
        np.testing.assert_allclose(values[1], values[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(values[2], values[1])
        if isinstance(values[0], list):
            assert values[0] == values[1] == values[2]


def test_other_arguments_and_damage_are_measured_again(tmp_path):
    here = study(tmp_path)
    a = here.measure(iterative.one_layer_earlier, MODEL, "zero", 0.05)
    b = here.measure(iterative.one_layer_earlier, MODEL, "zero", 0.5)
    assert not np.array_equal(a.earlier, b.earlier)
    for file in tmp_path.glob("measured/*.npz"):
        file.write_bytes(file.read_bytes()[:-10])
    assert [finding.agrees for finding in verify(tmp_path)] == [False, False]
    np.testing.assert_allclose(here.measure(iterative.one_layer_earlier, MODEL, "zero", 0.05).earlier, a.earlier, rtol=1e-5, atol=1e-7)
    assert sorted(finding.agrees for finding in verify(tmp_path)) == [False, True]


def test_a_measurement_has_a_manifest(tmp_path):
    here = study(tmp_path)
    here.measure(iterative.one_layer_earlier, MODEL, "zero", 0.05)
    (file,) = tmp_path.glob("measured/*.npz")
    noted = json.loads(manifest_of(file).read_text())
    model, prompts = here.load(MODEL)
    wanted = {"source": MODEL, "measured": "one_layer_earlier", "arguments": ["zero", 0.05]}
    wanted |= {"weights_sha256": model.weights_hash(), "tokens_sha256": prompts.sha256}
    assert {name: noted[name] for name in wanted} == wanted
    manifest_of(file).unlink()
    (finding,) = verify(tmp_path)
    assert finding.agrees is False and "manifest" in finding.detail

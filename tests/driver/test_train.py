"""What `train` says of its result before it ends."""

import pytest

from pipeline.config.settings import Settings
from pipeline.driver import train

pytestmark = pytest.mark.spark


@pytest.mark.parametrize(("learning_rate", "has_learned"), [(0.1, True), (1e-6, False)])
def test_a_network_that_did_not_learn_is_named(spark, settings, capsys, learning_rate, has_learned):
    tree = settings.model_dump()
    tree["train"] |= {"learning_rate": learning_rate, "warmup_epochs": 0}
    tree["model"] |= {"norm": "none"}
    tree["tracking"] |= {"system_metrics": False}
    result = train(spark, Settings.model_validate(tree))
    said = capsys.readouterr().err
    assert ("note: the network did not learn: its accuracy of" in said) is not has_learned
    assert f"{result.final_accuracy:.2%} on the test split is not above" in said or has_learned

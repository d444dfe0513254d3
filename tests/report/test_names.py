from pipeline.config import weights_text
from pipeline.report.names import arm_name, norm_words, values_words


def test_norms_have_names():
    assert norm_words("none") == "no normalization"
    assert norm_words("of_tomorrow") == "of tomorrow"


def test_names_say_the_values():
    values = {"model.norm": "batch", "workers.count": 2, "train.weight_ema": None, "train.bf16": True,
              "train.learning_rate": 1e-5}  # fmt: skip
    assert arm_name(values) == "batch, workers 2, weight_ema null, bf16 true, learning_rate 1e-05"


def test_rates_that_differ_late_have_names_that_differ():
    assert [arm_name({"train.learning_rate": rate}) for rate in (0.1234561, 0.1234562, 0.5)] == [
        "learning_rate 0.1234561", "learning_rate 0.1234562", "learning_rate 0.5",
    ]  # fmt: skip


def test_ways_to_balance_classes_have_names():
    values = {"train.class_weights": "balanced", "train.sampling": "shuffled"}
    assert arm_name(values) == "class_weights balanced, sampling shuffled"
    assert values_words(values) == "balanced class weights, shuffled sampling"
    assert values_words({"train.class_weights": "none"}) == "no class weights"


def test_weights_by_class_have_names_without_letters_that_mlflow_refuses():
    weights = {"train.class_weights": weights_text.write({"shirt": 2.0, "bag": 0.5})}
    assert weights == {"train.class_weights": "{bag: 0.5, shirt: 2}"}
    assert arm_name(weights) == "class_weights bag 0.5 shirt 2"
    assert values_words(weights) == "class weights bag 0.5 and shirt 2"


def test_weights_of_many_classes_have_short_names_that_differ():
    ten = [{f"class {n}": 1 + (n == last) for n in range(10)} for last in (8, 9)]
    names = [arm_name({"train.class_weights": weights_text.write(weights)}) for weights in ten]
    assert names[0] != names[1]
    assert all(name.startswith("class_weights class 0 1 class 1 1") and " 6 more " in name for name in names)
    assert max(map(len, names)) < 80


def test_an_own_network_and_its_norms_have_names():
    values = {"model.network": "my_package.nets:build", "model.norm": "keep", "model.options.stem.width": 8}
    assert arm_name(values) == "my_package.nets.build, keep, width 8"  # MLflow takes no colon
    assert values_words(values) == "my_package.nets:build, the network's own norms, width 8"

"""Configuration: composed, strict, and one line for every mistake."""

import dataclasses
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from pipelines_support import invoke

from manifold_defense.evaluation import SUITES
from manifold_defense.hardening import OBJECTIVES, Trades
from manifold_defense.projection import PRESETS, ProjectionConfig
from pipelines.config import Config
from pipelines.data import DATASETS
from pipelines.settings import ConfigError, in_quotes, known_keys, load_config, meanings, to_toml
from pipelines.stage import make_plans
from pipelines.stages import STAGES, in_order

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


def test_the_printed_configuration_reads_back_the_same(tmp_path):
    changed = load_config(None, ["gan.images=7", 'data.root="a \\"b\\" \\\\ c"', "projection.seed=3"])
    for config in (Config(), changed):
        file = tmp_path / "config.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        assert load_config(file) == config


@pytest.mark.parametrize("text", ["two\nlines", "tab\tnul\0", "\x7f\x1f", 'quotes " and \\', "ä 漢 😀"])
def test_any_text_is_printed_so_that_it_reads_back(tmp_path, text):
    file = tmp_path / "printed.toml"
    config = load_config(None, [f"filter={in_quotes(text)}"])
    assert config.filter == text
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(file) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_names_its_run(recipe):
    assert load_config(recipe).run == recipe.stem


def test_only_a_variant_that_is_trained_on_projections_depends_on_how_they_are_made():
    for variant, depends in (
        ('objective={name="latent"}', False),
        ('behind="filter"', True),
        ('behind="reconstructions"', True),
        ("", False),
    ):
        made_of = []
        for steps in (1, 2):
            config = load_config(None, [f"harden=[{{{variant}}}]", f"projection.steps={steps}"])
            made_of.append(make_plans(in_order(config), config)["harden"].fingerprint)
        assert (made_of[0] != made_of[1]) is depends


def test_there_is_a_recipe_for_every_data_set():
    assert {path.stem for path in RECIPES} - {"hardening", "mnist_union"} == set(DATASETS)


def test_the_digits_recipe_is_the_default():
    assert load_config(next(path for path in RECIPES if path.stem == "digits")) == Config()


def test_suites_and_presets_go_by_their_names(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text('projection = "accurate"\n[evaluate]\nattacks = "thorough"\n')
    named = load_config(file)
    assert (named.projection, named.evaluate.attacks) == (PRESETS["accurate"], SUITES["thorough"])
    set_ = load_config(None, ["projection=accurate", "evaluate.attacks=thorough"])
    assert set_ == named
    assert load_config(file, ["evaluate.attacks=quick"]).evaluate == Config().evaluate
    file.write_text(to_toml(named))
    assert load_config(file) == named


def _explained(kind, value):
    """Names of the settings of a dataclass, and of those in it, that no docstring explains."""
    known = meanings(kind)
    for item in dataclasses.fields(kind):
        inner = getattr(value, item.name)
        inner = inner[0] if isinstance(inner, tuple) and inner else inner
        if dataclasses.is_dataclass(inner):
            yield from _explained(type(inner), inner)
        elif not known.get(item.name):
            yield f"{kind.__name__}.{item.name}"


@pytest.mark.parametrize("kind", [Config, *OBJECTIVES])
def test_every_setting_is_explained(kind):
    assert not list(_explained(kind, kind()))


def test_what_explains_a_setting_is_its_own_docstring_s():
    known = meanings(Trades)
    assert known["beta"] == ["β"]  # its own
    assert known["eps"] == ["its radius, in pixel units of [0, 1]"]  # and of what it is made from
    assert len(meanings(ProjectionConfig)["precision"]) == 3
    shown = invoke("config", "--explain", "--set", "seed=3").output
    assert shown.index("\n# of all draws\nseed = 3\n") > 0
    assert tomllib.loads(shown) == tomllib.loads(to_toml(load_config(None, ["seed=3"])))
    assert "#" not in invoke("config").output


def test_settings_override_the_file_and_run_overrides_both(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('run = "a"\n[gan]\nimages = 10\nlr = 0.5\n')
    config = load_config(file, ["gan.images=2_000", "run=b"], run="c")
    assert (config.gan.images, config.gan.lr, config.run) == (2000, 0.5, "c")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gan.imagess=3", "unknown key gan.imagess; did you mean gan.images?"),
        ("nothing=1", "unknown key nothing"),
        ("harden.mine.training.images=5", "harden has neither table nor key mine; its table is hardened"),
        (".=3", "expected KEY=VALUE"),
        ("gan.=3", "expected KEY=VALUE"),
        ("gan.images=0", "images: expected at least 1, got 0"),
        ("gan.images=many", "gan.images"),
        ("gan.lr=nan", "lr"),
        ("gan.lr=1e308", "lr: expected above 0 and at most 1, got 1e+308"),
        ("gan.penalty_weight=inf", "penalty_weight: expected at least 0 and finite, got inf"),
        ("harden.training.weight_decay=inf", "weight_decay: expected at least 0 and finite, got inf"),
        ("harden.objective.eps=1e308", "eps: expected above 0 and at most a million, got 1e+308"),
        ("harden.objective.eps=8", "eps of linf: expected at most 1, for images in [0, 1]"),
        ("harden.objective={name='interval_bounds',eps=3}", "eps of linf: expected at most 1"),
        ("harden.objective={name='curriculum',eps=3}", "eps of linf: expected at most 1"),
        ("harden.objective={name='robust_manifold',eps=3}", "eps of linf: expected at most 1"),
        ("evaluate.threats=[{eps=1e39}]", "eps: expected above 0 and at most a million, got 1e+39"),
        ("projection.seed=99999999999999999999", "seed: expected a whole number of at least 0, below"),
        ("data.flip=0", "data.flip: expected true or false, got 0"),
        ("gan.lr=inf", "lr: expected above 0 and at most 1, got inf"),
        ("encoder.lr=inf", "lr: expected above 0 and at most 1, got inf"),
        ("harden.training.lr=inf", "lr: expected above 0 and at most 1, got inf"),
        ("evaluate.mixed=1", "mixed: expected in [0, 1), got 1"),
        ("evaluate.images=true", "evaluate.images: expected int, got a truth value"),
        ("seed=true", "seed: expected int, got a truth value"),
        ("harden.objective.eps=true", "harden.0.objective.eps: expected float, got a truth value"),
        ("certify.radii_l2=[0.5, true]", "certify.radii_l2.1: expected float, got a truth value"),
        (
            'harden={objective={name="pgd",eps=true}}',
            "harden.objective.eps: expected float, got a truth value",
        ),
        ("data.root=2024", "data.root: expected text in quotes, got 2024"),
        ("filter=2024", "filter: expected text in quotes, got 2024"),
        ("evaluate.threats=linf", "evaluate.threats: expected a list, [...], got 'linf'"),
        ("project.threat={norm='patch', eps=3}", "threat.norm: expected one of linf, l2, l1, got 'patch'"),
        ("gan.loss=hinge", "gan.loss"),
        ("gan=3", "gan"),
        ("gan", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("gan.images.more=3", "images is not a table"),
        ("gan.network.latent_dim=-1", "latent_dim: expected at least 1"),
        ("data.name=imagenet", "name must be one of digits"),
        ("data.image_size=7", "image_size"),
        ("run=a/b", "run: expected a plain folder name"),
        ("run=..", "run: expected a plain folder name"),
        ("seed=-1", "seed"),
        ("projection.solver=newton", "projection.solver"),
        ("projection.steps=-1", "steps: expected a whole number of at least 0"),
        ("evaluate.threats=[]", "at least one threat"),
        ('evaluate.threats=[{norm="l7"}]', "evaluate.threats.0.norm"),
        ("evaluate.threats=[{eps=-0.1}]", "eps: expected above 0"),
        ('evaluate.attacks=[{name="pgd", views=["bpda"]}]', "views"),
        ('evaluate.threats=[{norm="patch", eps=0.3}]', "whole number"),
        ('evaluate.threats=[{norm="patch", eps=3}]', "no attack but noise applies to the threat patch 3"),
        ("evaluate.threats=[{eps=0.1}, {eps=0.1}]", "threats: expected each of them once"),
        ('evaluate.baselines=["jpeg", "jpeg"]', "baselines: expected each of them once"),
        ('evaluate.baselines=["median"]', "baselines"),
        ("evaluate.checks=-1", "checks: expected at least 0, got -1"),
        ("evaluate.batch_size=0", "batch_size: expected at least 1, got 0"),
        ("evaluate.filter=folder", "set classifier as well"),
        (
            "evaluate.attacks=slow",
            "evaluate.attacks: expected quick, thorough or a list of attacks, got 'slow'",
        ),
        ("projection=best", "projection: expected reference, accurate, robust, fast, single_shot or a table"),
        ('evaluate.threats=[{norm="linf",eps=8}]', "eps of linf: expected at most 1, for images in [0, 1]"),
        ('evaluate.threats=[{norm="linf",eps=0.3}', "not TOML"),
        ("harden.objective.norm=l0", "harden.0.objective.norm"),
        ('evaluate.attacks=[{name="fgsm", loss="both"}]', "loss"),
        ('evaluate.attacks=[{name="cw", loss="margin"}]', "loss of cw"),
        ('evaluate.attacks=[{name="cw"}]', "no attack but noise applies to the threat linf 0.15"),
        ('evaluate.attacks=[{name="pgd"}, {name="pgd", steps=9}]', "two attacks are called pgd"),
        ("evaluate.threats=[{eps=inf}]", "eps: expected above 0 and at most a million"),
        ("encoder.disturbance.kind=fgsm", "encoder.disturbance.kind"),
        ("encoder.disturbance.threats=[]", "threats: expected at least one"),
        ("encoder.disturbance={threats=[{norm='patch', eps=2}], windows=3}", "windows: expected 0, for only"),
        (
            "encoder={batch_size=1, disturbance={pieces=2}}",
            "disturbance.pieces: expected 0 in a batch of one",
        ),
        (
            'harden={training={batch_size=1}, objective={name="union", disturbance={pieces=2}}}',
            "objective.disturbance.pieces: expected 0 in a batch of one",
        ),
        ('harden.objective={name="union", disturbance={step=2}}', "disturbance.step"),
        ("encoder.windows=3", "did you mean encoder.disturbance.windows?"),
        ("encoder.agreement_weight=-1", "agreement_weight: expected at least 0"),
        ("encoder={agreement_weight=1, share=0}", "share: expected in (0, 1], got 0"),
        ("encoder.share=0.5", "share: expected 1 without an agreement_weight, got 0.5"),
        ("encoder.classifier=./mine", "classifier: expected none without an agreement_weight"),
        (
            "encoder.body=mine",
            "encoder.body: expected a variant of harden or a folder such as ./mine, got 'm",
        ),
        ("encoder.body=''", "encoder.body: expected a variant of harden or a folder"),
        ("encoder={agreement_weight=1, classifier='auto'}", "encoder.classifier: expected a variant"),
        ("harden.name=joint", "name: joint means something else as encoder.body"),
        ("harden.objective.clean_share=2", "clean_share: expected in [0, 1]"),
        ("harden.objective.name=magic", "expected one of clean, noise, pgd"),
        ("harden.objective.epz=1", "did you mean harden.objective.eps?"),
        ("harden.name=filter", "another row of the tables"),
        ("harden.name=a/b", "name: expected letters"),
        ('harden=[{name="a"}, {name="a"}]', "two variants are called a"),
        ('harden=[{name="a", start="b"}]', "harden.a.start: expected a variant before it"),
        ("harden.architecture.name=vgg", "harden.0.architecture.name"),
        (
            'harden=[{name="a"}, {name="b", start="a", architecture={width=4}}]',
            "starts from a has that of it",
        ),
        ("harden.teacher=hardened", "teacher: objective pgd asks none"),
        (
            "harden={objective={name='interval_bounds'}, behind='filter'}",
            "behind: interval bounds follow none but binarise",
        ),
        (
            "harden={objective={name='interval_bounds'}, architecture={name='resnet18'}}",
            "harden.hardened: interval bounds follow a cnn or shallow, no resnet18",
        ),
        (
            "harden=[{name='a', architecture={name='resnet18'}}, {name='b'}, "
            "{name='c', start='a', objective={name='interval_bounds'}}]",
            "harden.c: interval bounds follow a cnn or shallow, no resnet18",
        ),
        ("harden={objective={name='noise'}, behind='filter'}", "behind: a filter takes images in [0, 1]"),
        ("harden={objective={name='gradient_penalty'}, behind='filter'}", "cannot be differentiated again"),
        ("certify.radii_l2=[0.5,0.5]", "radii_l2: expected each of them once"),
        ('certify.methods=["lipschitz","lipschitz"]', "methods: expected each of them once"),
        (
            "harden.view=identity",
            "view: expected exact for what is not trained behind the filter, got identity",
        ),
        (
            "harden={behind='filter',view='soft'}",
            "harden.hardened.view: expected one of identity, exact, which such a projection has, got soft",
        ),
        ("harden={behind='filter',view='bpda'}", "harden.0.view: Input should be 'exact'"),
        ("harden.name=jobs", "name: jobs is what a stage keeps beside its variants"),
        ("harden.name=stage.json", "name: stage.json is what a stage keeps beside its variants"),
        ("harden.name=a.partial", "name: a.partial is what a stage keeps beside its variants"),
        ("run=' '", "run: expected a plain folder name, got ' '"),
        ("run='a '", "run: expected a plain folder name, got 'a '"),
        ('run="a\\nb"', "run: expected a plain folder name, got 'a\\nb'"),
        ("evaluate.threats.2.eps=0.1", "threats has several tables; expected one of 0, 1"),
        ("certify.radii_l2.0=0.5", "certify.radii_l2: expected a list"),
        ("certify.radii_l2=[]", "radii_l2: expected at least one"),
        ("certify.radii_linf=[1.5]", "radii_linf: expected at least one radius, all above 0 and at most 1,"),
        ("harden.objective={name='curriculum',switch=1}", "switch: expected below 1"),
        ("certify.boxes=0", "boxes: expected at least 1, got 0"),
        ("certify.bank=0", "bank: expected at least 1, got 0"),
        ("certify.smoothing.sigma=0", "sigma: expected above 0"),
        ("harden.objective={name='interval_bounds', free=0}", "free: expected above 0"),
        ("harden.objective={name='interval_bounds', free=1.5}", "free: expected in [0, 1], got 1.5"),
        ("harden.objective={name='interval_bounds', steps=0}", "steps: expected above 0"),
        ("fabric.precision=8", "fabric.precision"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(setting, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["gan.images=64", setting])
    message = str(caught.value)
    assert said in message
    assert message.startswith(f"--set {setting}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"gan = [", "not TOML"),
        (b"\xff\xfe", "not TOML"),
        (b"gam = 1", "unknown key gam"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, content, said):
    file = tmp_path / "bad.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_changes_the_keys_of_its_base_and_replaces_its_arrays(tmp_path):
    (tmp_path / "folder").mkdir()
    low, middle, top = tmp_path / "low.toml", tmp_path / "folder" / "middle.toml", tmp_path / "top.toml"
    low.write_text(
        'run = "low"\ngan = {images = 10, lr = 0.5}\n[[harden]]\nname = "a"\n[[harden]]\nname = "b"\n'
    )
    middle.write_text('base = "../low.toml"\n[gan]\nimages = 20\n[gan.network]\nlatent_dim = 3\n')
    top.write_text('base = "folder/middle.toml"\nrun = "top"\n[[harden]]\nobjective = {name = "trades"}\n')
    config = load_config(top, ["gan.lr=0.25"])
    assert (config.run, config.gan.images, config.gan.lr, config.gan.network.latent_dim) == (
        "top",
        20,
        0.25,
        3,
    )
    assert [variant.objective.name for variant in config.harden] == ["trades"]
    assert [variant.name for variant in load_config(middle).harden] == ["a", "b"]
    assert load_config(middle).run == "low"


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ('"top.toml"', "top.toml: base: expected a file that is not built on this one"),
        ('"other.toml"', "other.toml: base: expected a file that is not built on this one"),
        ('"none.toml"', "none.toml: cannot be read"),
        ('"bad.toml"', "bad.toml: unknown key gam"),
        ("3", "top.toml: base: expected text in quotes, got 3"),
    ],
)
def test_a_base_that_cannot_be_is_one_line_that_names_the_file(tmp_path, base, said):
    top = tmp_path / "top.toml"
    top.write_text(f"base = {base}\n")
    (tmp_path / "other.toml").write_text('base = "top.toml"\n')
    (tmp_path / "bad.toml").write_text("gam = 1\n")
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(top)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("which", ["", "0.", "hardened."])
def test_the_default_variant_goes_by_its_name(which):
    config = load_config(None, [f"harden.{which}objective.eps=0.2"])
    assert [variant.objective.eps for variant in config.harden] == [0.2]
    assert replace(config, harden=Config().harden) == Config()
    assert load_config(None, []) == Config()


@pytest.mark.parametrize(
    "setting",
    [
        "projection.strength=0.5",
        "projection.seed=7",
        "project.threat.norm=l2",
        "certify.smoothing.sigma=0.3",
        "gan.network.latent_dim=9",
        "encoder.disturbance.steps=9",
        "evaluate.checks=9",
        "data.shift=2",
        "classifier.training.lr=0.5",
        "harden.objective.eps=0.2",
    ],
)
def test_a_setting_changes_what_it_names_and_nothing_beside(setting, tmp_path):
    before, after = (to_toml(load_config(None, settings)).splitlines() for settings in ([], [setting]))
    assert len([pair for pair in zip(before, after, strict=True) if len(set(pair)) == 2]) == 1
    *tables, last = setting.partition("=")[0].split(".")
    if tables[0] != "harden":  # an array: what a file says takes the place of all of it
        file = tmp_path / "one.toml"
        file.write_text(f"[{'.'.join(tables)}]\n{last} = {_quoted(setting.partition('=')[2])}\n")
        assert load_config(file) == load_config(None, [setting])


def _quoted(value):
    return f'"{value}"' if value.isalnum() and not value.isdigit() else value


def test_settings_that_need_one_another_come_in_any_order():
    settings = ["evaluate.filter=./mine", "evaluate.classifier=mine:model", "seed=1"]
    assert load_config(None, settings) == load_config(None, settings[::-1])
    with pytest.raises(ConfigError, match=r"^--set evaluate.filter=./mine: .*set classifier as well"):
        load_config(None, ["seed=1", "evaluate.filter=./mine", "seed=2"])
    with pytest.raises(ConfigError, match=r"^--set seed=-1: "):
        load_config(None, ["seed=-1", "run=b"])


def test_known_keys_reach_into_tables():
    assert {"gan", "gan.network.latent_dim", "data.root", "evaluate.threats"} <= set(known_keys())


BEHIND = 'harden=[{name="hardened"}, {name="through", behind="filter"}]'


@pytest.mark.parametrize(
    ("settings", "body", "first"),
    [
        ([], "hardened", "harden"),
        (["encoder.body=hardened"], "hardened", "harden"),
        (['harden=[{name="a", objective={name="clean"}}, {name="b"}, {name="c"}]'], "b", "harden"),
        (['harden=[{name="a", behind="binarise"}, {name="b"}]'], "b", "harden"),
        (['harden=[{name="a", objective={name="clean"}}]'], "", "train-encoder"),
        (["harden=[]"], "", "train-encoder"),
        (["encoder.body=joint"], "", "train-encoder"),
        (["encoder.body=./mine"], "./mine", "train-encoder"),
        (["filter=./mine"], "", "train-encoder"),
        (["filter=./mine", "encoder.body=hardened"], "hardened", "harden"),
        (["encoder.body=joint", "encoder.agreement_weight=1", "encoder.classifier=hardened"], "", "harden"),
        ([BEHIND], "", "train-encoder"),
        ([BEHIND, "encoder.body=./mine"], "./mine", "train-encoder"),
    ],
)
def test_an_encoder_begins_as_a_variant_that_stands_before_it(settings, body, first):
    config = load_config(None, settings)
    assert config.encoder_body == body
    order = list(in_order(config))
    assert sorted(order) == sorted(STAGES)
    for name in order:
        assert {*STAGES[name].inputs(config)} <= {*order[: order.index(name)]}
    assert next(name for name in order if name in ("harden", "train-encoder")) == first


@pytest.mark.parametrize(
    "own", ["encoder.body=hardened", "encoder={agreement_weight=1, classifier='hardened'}"]
)
def test_an_encoder_cannot_wait_for_what_waits_for_it(own):
    with pytest.raises(ConfigError, match=r"hardened would be trained before .* but through needs"):
        load_config(None, [BEHIND, own])

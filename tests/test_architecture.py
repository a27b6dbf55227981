"""What the code may import, touch and catch: read from its syntax, without running it."""

import ast
import functools
import re
from pathlib import Path

import pytest

from models import METHODS
from opacus_ext import private_data, records

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "data",
    "evaluation",
    "extractors",
    "models",
    "opacus_ext",
    "pipeline",
    "plot",
    "scripts",
    "utils",
)
# Package -> what else of ours it may import. Arrows never point up.
ALLOWED = {
    "utils": set(),
    "data": {"utils"},
    "opacus_ext": {"data", "utils"},
    "extractors": {"data", "utils"},
    "models": {"opacus_ext", "extractors", "data", "utils"},
    "evaluation": {"extractors", "data", "utils"},
    "pipeline": {"evaluation", "models", "extractors", "opacus_ext", "data", "utils"},
}


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


PROGRAMS = ("run.py", "eval.py")
EVERYTHING = [*sources(*PACKAGES), *(ROOT / program for program in PROGRAMS)]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that the file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        found |= {text for annotation in annotations(node) for text in dotted_texts(annotation)}
    return found


def annotations(node: ast.AST) -> list[ast.expr]:
    """The types of a parameter, of what a function returns, or of a variable."""
    found = [getattr(node, field, None) for field in ("annotation", "returns")]
    return [annotation for annotation in found if isinstance(annotation, ast.expr)]


def dotted_texts(annotation: ast.expr) -> set[str]:
    """Dotted names that are written as text in an annotation."""
    texts = (node.value for node in ast.walk(annotation) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and "." in text and " " not in text}


@pytest.mark.parametrize("path", sources(*ALLOWED), ids=name)
def test_imports_never_point_up(path):
    own = path.relative_to(ROOT).parts[0]
    ours = {module.split(".")[0] for module in imports(path)} & {*PACKAGES, "run", "eval", "judging", "tests"}
    assert ours <= {own, *ALLOWED[own]}, f"{name(path)} imports {sorted(ours - {own, *ALLOWED[own]})}"


def untyped(code: ast.AST) -> list[str]:
    """Parameters without a type, behind which an arrow to another room could hide, and functions without a return type,
    except lambdas and the kernels that Triton compiles."""
    found = []
    for node in ast.walk(code):
        if not isinstance(node, ast.FunctionDef) or any(
            "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
        ):
            continue
        every = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            node.args.vararg,
            node.args.kwarg,
        ]
        names = [argument.arg for argument in every if argument is not None and argument.annotation is None]
        found += [f"{node.name}({argument})" for argument in names if argument not in ("self", "cls")]
        found += [f"{node.name}() ->"] if node.returns is None else []
    return found


TYPED = [*sources("utils", "data", "models", "pipeline"), *(ROOT / program for program in PROGRAMS)]


@pytest.mark.parametrize("path", TYPED, ids=name)
def test_every_parameter_has_a_type(path):
    assert not untyped(tree(path)), name(path)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def f(a, *, b: int) -> int: pass", ["f(a)"]),
        ("class C:\n  def f(self, *c): pass", ["f(c)", "f() ->"]),
        ("def f(a: int, **k: int) -> None: pass", []),
    ],
)
def test_an_untyped_parameter_would_be_seen(code, found):
    assert untyped(ast.parse(code)) == found


@pytest.mark.parametrize(
    "text",
    [
        "if TYPE_CHECKING:\n    from models.dpdm import DPDM",
        "def f(x: 'models.dpdm.DPDM'): pass",
        "import models.dpdm",
    ],
)
def test_an_arrow_is_seen_wherever_it_hides(text, tmp_path):
    (tmp_path / "file.py").write_text(text)
    assert any(module.startswith("models") for module in imports(tmp_path / "file.py"))


def test_the_pipeline_knows_no_single_method():
    """A method's own files and settings are known to the method alone. Noise, which does nothing, stands in for "none"
    in eval.py --images."""
    for path in sources("pipeline"):
        texts = {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)}
        assert not texts & ({*METHODS} - {"Noise"}), name(path)


RECORDED = {"CONFIG", "ENVIRONMENT", "PRIVACY", "CARD", "RESULTS", "PROVENANCE"}  # of utils/artefacts.py


def recorded_files(code: ast.AST) -> list[str]:
    """Calls of write_json and write_text that write a file of a run's record."""
    calls = [
        node for node in ast.walk(code) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    return [
        ast.unparse(call)
        for call in calls
        if call.func.id in ("write_json", "write_text")
        and RECORDED & {*re.findall(r"\w+", ast.unparse(call.args[0]))}
    ]


def test_the_files_of_a_record_have_one_writer():
    for path in EVERYTHING:
        if name(path) != "pipeline/record.py":
            assert not recorded_files(tree(path)), name(path)
    assert len(recorded_files(tree(ROOT / "pipeline/record.py"))) == len(RECORDED)


def method_modules() -> set[str]:
    modules = {METHODS.resolve(method).__module__ for method in METHODS}
    return {module for module in modules if module.startswith("models.")}  # other tests register methods too


def test_the_root_of_models_holds_the_methods_and_their_contract():
    found = {f"models.{path.stem}" for path in (ROOT / "models").glob("*.py")}
    assert found == method_modules() | {"models.synthesizer", "models.__init__"}


def test_a_method_imports_no_other_method():
    """What methods share is models/synthesizer.py and the packages below models/."""
    modules = method_modules()
    for own in modules:
        found = imports(ROOT / (own.replace(".", "/") + ".py"))
        others = {other for other in modules if any(f"{module}.".startswith(f"{other}.") for module in found)}
        assert not others - {own}, (own, others)


def test_only_the_boundary_draws_privacy_noise():
    for path in sources("models", "evaluation", "extractors", "data", "utils"):
        assert not [module for module in imports(path) if module.startswith("opacus_ext.noise")], name(path)


# ------------------------------------------------------------------------------------------ the trust boundary


# How a mechanism of opacus_ext reaches the records. Nobody else may name any of it.
RECORD_ACCESS = {"RecordAccess", "MappedRecords", "records_of"}


def private_names() -> set[str]:
    """The underscored attributes and methods of PrivateData and RecordAccess, and the names that lead to the latter."""
    kinds = [
        node
        for module in (private_data, records)
        for node in tree(Path(module.__file__)).body
        if isinstance(node, ast.ClassDef) and node.name in ("PrivateData", "RecordAccess", "MappedRecords")
    ]
    attributes = {
        node.attr
        for kind in kinds
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
    methods = {node.name for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)}
    underscored = {found for found in attributes | methods if found.startswith("_")}
    return {found for found in underscored if not found.startswith("__")} | RECORD_ACCESS


def reaches_inside(code: ast.AST, inside: set[str]) -> list[str]:
    """Places that touch an attribute of another object named like one of PrivateData's or RecordAccess's own, by dot or
    by string, or that import the access to records."""
    found = []
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom | ast.Import):
            source = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [alias.name for alias in node.names]
            found += [
                n for n in names if n in RECORD_ACCESS or f"{source}{n}".startswith("opacus_ext.records")
            ]
        if isinstance(node, ast.Name) and node.id in RECORD_ACCESS:
            found.append(node.id)
        if (
            isinstance(node, ast.Attribute)
            and node.attr in inside
            and ast.unparse(node.value) not in ("self", "cls")
        ):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Constant) and node.value in inside:
            found.append(repr(node.value))
        if isinstance(node, ast.Attribute) and node.attr == "__dict__":
            found.append(ast.unparse(node))
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "vars"
            and isinstance(node.args[0], ast.Name)
        ):
            found.append(ast.unparse(node))
    return found


def test_nobody_reaches_inside_the_private_data():
    inside = private_names()
    assert {"_images", "_labels", "_records", "records_of"} <= inside
    for path in EVERYTHING:
        if path.is_relative_to(ROOT / "opacus_ext"):
            continue
        assert not reaches_inside(tree(path), inside), name(path)


@pytest.mark.parametrize(
    "breach",
    [
        "private._records.take(slice(0, 1))",
        "getattr(private, '_records').take(0)",
        "data.private._records._labels",
        "records_of(private).take(slice(0, 1))",
        "private_data.records_of(private)",
        "from opacus_ext.private_data import records_of",
        "from opacus_ext.private_data import records_of as peek",
        "from opacus_ext.records import NoiseSource",
        "from opacus_ext import records",
        "import opacus_ext.records",
        "RecordAccess(samples, spec, noise, device, 1)",
        "private.__dict__",
        "vars(private)",
    ],
)
def test_reaching_inside_would_be_seen(breach):
    assert reaches_inside(ast.parse(breach), private_names())


def test_records_are_revealed_to_the_programs_alone():
    """Nobody else holds the door, and what a method is given has none (test_mechanisms.py). Of the programs one file
    opens it, for what is asked for alone."""
    for path in EVERYTHING:
        calls = [
            ast.unparse(node)
            for node in ast.walk(tree(path))
            if (isinstance(node, ast.Attribute) and node.attr == "reveal")
            or (isinstance(node, ast.ImportFrom) and node.module == "opacus_ext.disclosure")
        ]
        if name(path) != "pipeline/evaluation.py" and not name(path).startswith("scripts/"):
            assert not calls, (name(path), calls)
    assert ".reveal(" in (ROOT / "pipeline/evaluation.py").read_text()


RANDOM = {
    "bernoulli", "bernoulli_", "cauchy_", "dropout", "exponential_", "geometric_", "multinomial", "normal", "normal_",
    "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform_",
}  # fmt: skip


def global_randomness(code: ast.AST) -> list[str]:
    """Calls that draw from a generator which others can seed."""
    found = []
    for node in ast.walk(code):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        text = ast.unparse(node.func)
        seeded = any(keyword.arg == "generator" for keyword in node.keywords)
        if (node.func.attr in RANDOM and not seeded) or text.startswith(
            ("np.random.", "numpy.random.", "random.")
        ):
            found.append(text)
        if text in ("torch.manual_seed", "torch.seed", "torch.set_rng_state"):
            found.append(text)
    return found


def test_the_boundary_never_uses_a_global_generator():
    for path in sources("opacus_ext"):
        assert not global_randomness(tree(path)), name(path)


@pytest.mark.parametrize("path", sources("opacus_ext"), ids=name)
def test_the_boundary_is_fully_typed(path):
    assert not untyped(tree(path)), name(path)


@pytest.mark.parametrize(
    "breach",
    ["torch.randn(3)", "x.normal_()", "np.random.normal()", "torch.manual_seed(0)", "torch.randn_like(x)"],
)
def test_global_randomness_would_be_seen(breach):
    assert global_randomness(ast.parse(breach))


# ------------------------------------------------------------------------------------------ errors and size


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_nothing_is_caught_wholesale(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            assert not {"everything", "Exception", "BaseException"} & set(
                caught.strip("()").replace(" ", "").split(",")
            ), f"{name(path)}:{node.lineno} catches {caught}"


def test_no_failure_inside_a_mechanism_is_caught():
    """A mechanism that fails must end the run; a repaired answer might be a clean one. Only a part of a batch that
    did not fit in memory is taken again, with the same draws."""
    for file in (
        "private_data.py",
        "records.py",
        "mechanisms.py",
        "dpsgd.py",
        "noise.py",
        "sampling.py",
        "ledger.py",
        "sanitize.py",
    ):
        caught = [
            ast.unparse(node.type)
            for node in ast.walk(tree(ROOT / "opacus_ext" / file))
            if isinstance(node, ast.ExceptHandler)
        ]
        assert caught == (["torch.OutOfMemoryError"] if file == "sampling.py" else []), file


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name(path)}: {node.name} has too many lines"


# ------------------------------------------------------------------------------------------ methods are complete


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_configured_and_described(method):
    assert (ROOT / "configs" / "method" / f"{method}.yaml").is_file()
    assert (ROOT / "configs" / "presets" / f"{method}.yaml").is_file()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert any(method in row for row in rows), f"README.md has no table row for {method}"

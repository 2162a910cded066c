"""The rules of ARCHITECTURE.md, read off the source code: what may import what, and what a file must say."""

import ast
import functools
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("snapfusion", "pipelines", "jobs")

# A module of snapfusion imports its own package, and what stands in a row above its own.
LAYERS = (
    {"settings", "prediction_types", "records", "solver_names", "storage"},
    {"schedule", "noise"},
    {"solvers", "diffusers_solvers"},
    {"sampling"},
    {"distill", "consistency"},
    {"losses"},
    {"distribution_matching"},
    {"models"},
    {"training", "export"},
    {"evolution"},
    {"metrics"},
    {"mini"},
)
METHOD = (
    "snapfusion.schedule",
    "snapfusion.sampling",
    "snapfusion.distill",
    "snapfusion.consistency",
    "snapfusion.losses",
    "snapfusion.distribution_matching",
    "snapfusion.solvers",
)
# A package of jobs, and of pipelines, imports its own folder and what stands above it here.
PIPELINES = (
    {"rejections", "storage", "fetching"},
    {"sources"},
    {"tables"},
    {"stages", "ray_data"},
    {"loading", "costs"},
    {"datasets"},
    {"dedup", "deletion", "download"},
    {"exports"},
)
JOBS = (
    {"runtime"},
    {"evaluation"},
    {"training", "serving"},
    {"evolution", "deletion", "publishing"},
    {"recipes"},
    {"cli"},
    {"reports"},
    {"planning"},
    {"gpu_check"},
)
ENTRY_POINTS_THAT_RUN_OTHERS = {
    "jobs.run_pipeline",
    "jobs.distill_schedule",
    "jobs.top_up",
    "jobs.ablate",
    "jobs.evolve_unet",  # measures the latency table that it lacks
    "jobs.compare_chance",  # likewise
}
HEAVY = {
    "torch",
    "ray",
    "diffusers",
    "transformers",
    "numpy",
    "pyarrow",
    "open_clip",
    "PIL",
    "matplotlib",
    "coremltools",
    "executorch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "starlette",
    "uvicorn",
}
SOURCE_OF_A_FORMULA = r"SnapFusion (Eq\.|Sec\.|Alg\.|Table|Fig\.|App\.)|\(\w+( (and \w+|et al\.))? \d{4}\)"
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager"}
OWN_FILE_ONLY = {
    "coremltools": {"snapfusion.export.coreml", "snapfusion.export.coreml_package"},
    "executorch": {"snapfusion.export.executorch"},
    "onnx": {"snapfusion.export.onnx"},
    "onnxscript": {"snapfusion.export.onnx"},
    "onnxruntime": {"snapfusion.export.onnx", "snapfusion.export.onnx_runtime"},
}


@dataclass(frozen=True)
class Module:
    name: str
    tree: ast.Module

    @functools.cached_property
    def imports(self) -> set[str]:
        """Every dotted name imported anywhere in it; for `from a import b` both a and a.b."""
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}: imports are absolute"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return names

    def imports_any(self, *packages: str) -> list[str]:
        return sorted(
            name
            for name in self.imports
            if name.startswith(tuple(f"{p}." for p in packages)) or name in packages
        )

    def calls(self, function: str) -> bool:
        """Whether `function(...)` or `anything.function(...)` is called in it."""
        called = (node.func for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        return any(function in (getattr(name, "id", None), getattr(name, "attr", None)) for name in called)


@functools.cache
def modules(*packages: str) -> tuple[Module, ...]:
    """The modules of the packages (dotted names) by their source files."""
    found = []
    for package in packages:
        for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found.append(Module(name, ast.parse(path.read_text())))
    assert found
    return tuple(found)


def reachable(start: Module) -> Iterator[Module]:
    """`start` and every module of ours that importing it imports."""
    by_name = {module.name: module for module in modules(*PACKAGES)}
    waiting, seen = [start], {start.name}
    while waiting:
        module = waiting.pop()
        yield module
        new = (module.imports & by_name.keys()) - seen
        seen |= new
        waiting += [by_name[name] for name in new]


def named(package: str):
    return pytest.mark.parametrize("module", modules(package), ids=lambda module: module.name)


@named("snapfusion")
def test_method_imports_no_ray_tables_or_upper_packages(module):
    assert module.imports_any("ray", "pyarrow", "deltalake", "argparse", "pipelines", "jobs") == []


@named("snapfusion")
def test_inside_the_method_imports_go_downward(module):
    def layer(name: str) -> int:
        layers = [rank for rank, names in enumerate(LAYERS) if name in names]
        assert layers, f"snapfusion.{name} stands in no layer: put it into LAYERS and into ARCHITECTURE.md"
        return layers[0]

    own = [*module.name.split("."), ""][1]
    if not own:
        assert module.imports_any("snapfusion") == []
        return
    for name in module.imports_any("snapfusion"):
        other = name.split(".")[1] if "." in name else own
        assert other == own or layer(other) < layer(own), f"{module.name} imports {name}"


@pytest.mark.parametrize(("package", "layers"), [("pipelines", PIPELINES), ("jobs", JOBS)])
def test_packages_import_downward(package, layers):
    rank = {name: number for number, names in enumerate(layers) for name in names}
    for module in modules(package):
        own = [*module.name.split("."), ""][1]
        if own not in rank or module.name.endswith(".__main__"):
            assert package == "jobs" or not own, (
                f"{module.name} is in no layer: add its package here and to ARCHITECTURE.md"
            )
            continue
        for name in module.imports_any(package):
            other = [*name.split("."), ""][1]
            assert other == own or not other or rank.get(other, len(layers)) < rank[own], (
                f"{module.name} imports {name}"
            )


def test_no_module_imports_itself_through_others():
    by_name = {module.name: module for module in modules(*PACKAGES)}
    graph = {name: (module.imports & by_name.keys()) - {name} for name, module in by_name.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle


def test_entry_points_are_thin_and_rarely_imported():
    entries = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py")} - {"jobs.__init__"}
    for module in modules(*PACKAGES):
        if module.name not in ENTRY_POINTS_THAT_RUN_OTHERS:
            assert module.imports & entries <= {module.name}, module.name
    lines = {name: len((ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()) for name in entries}
    assert {name: count for name, count in lines.items() if count > 120} == {}


def modules_after(program: str) -> set[str]:
    """The modules that a new interpreter has loaded after a program."""
    command = [sys.executable, "-c", f"import sys; {program}; print('loaded:', *sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.rpartition("loaded:")[2].split())


def test_recipes_load_without_heavy_libraries():
    loaded = modules_after("from jobs.recipes.registry import RECIPES; [make() for make in RECIPES.values()]")
    assert HEAVY & loaded == set()


@named("pipelines")
def test_pipelines_know_no_jobs_and_no_ray_train(module):
    assert module.imports_any("jobs", "ray.train") == []


@pytest.mark.parametrize("package", ["pipelines.stages", "pipelines.sources"])
def test_stages_and_sources_reach_no_ray(package):
    for stage in modules(package):
        for module in reachable(stage):
            assert module.imports_any("ray") == [], f"{stage.name} reaches {module.name}"


def test_fetching_imports_nothing_else_of_the_project():
    for module in modules("pipelines.fetching"):
        others = {name for name in module.imports if not name.startswith("pipelines.fetching")}
        assert {name.split(".")[0] for name in others} - {*sys.stdlib_module_names, "img2dataset"} == set()


def test_nothing_imports_jobs():
    for module in modules("snapfusion", "pipelines"):
        assert module.imports_any("jobs") == [], module.name


def test_ray_train_is_used_in_one_file():
    users = {module.name for module in modules(*PACKAGES) if module.imports_any("ray.train")}
    assert users <= {"jobs.training.trainer"}


def test_ray_data_is_used_in_two_files():
    assert [module.name for module in modules(*PACKAGES) if module.calls("map_batches")] == [
        "pipelines.ray_data.execution",
        "pipelines.ray_data.shuffle",
    ]
    assert [module.name for module in modules(*PACKAGES) if module.calls("map_groups")] == [
        "pipelines.ray_data.shuffle"
    ]


@pytest.mark.parametrize(("library", "owners"), OWN_FILE_ONLY.items())
def test_compilers_are_imported_lazily_in_one_file(library, owners):
    for module in modules(*PACKAGES):
        if module.name not in owners:
            assert module.imports_any(library) == [], module.name
            continue
        at_import = Module(
            module.name, ast.Module([_without_functions(node) for node in module.tree.body], [])
        )
        assert at_import.imports_any(library) == []


def _without_functions(node: ast.stmt) -> ast.stmt:
    """The statement without the bodies of functions in it: what runs when the module is imported."""

    class Emptier(ast.NodeTransformer):
        def visit_FunctionDef(self, function: ast.FunctionDef) -> ast.AST:
            function.body = [ast.Pass()]
            return function

        def visit_If(self, branch: ast.If) -> ast.AST:
            # For type checkers alone; nothing is imported there.
            if ast.unparse(branch.test) == "TYPE_CHECKING":
                branch.body = [ast.Pass()]
            return branch

    return Emptier().visit(ast.parse(ast.unparse(node)).body[0])


@pytest.mark.parametrize("package", ["snapfusion", "pipelines"])
def test_libraries_do_not_print(package):
    assert [module.name for module in modules(package) if module.calls("print")] == []


def test_importing_the_method_leaves_ray_out():
    assert {"ray", "pyarrow"} & modules_after("import snapfusion.sampling") == set()


@pytest.mark.parametrize("module", modules(*PACKAGES), ids=lambda module: module.name)
def test_files_have_specific_names_and_docstrings(module):
    assert module.name.rsplit(".", 1)[-1] not in EMPTY_NAMES
    assert ast.get_docstring(module.tree)


@pytest.mark.parametrize(
    "module", [m for m in modules("snapfusion") if m.name in METHOD], ids=lambda m: m.name
)
def test_every_function_of_the_method_names_its_source(module):
    for name, function in public_functions(module):
        assert re.search(SOURCE_OF_A_FORMULA, ast.get_docstring(function) or ""), f"{module.name}.{name}"


def public_functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods with their dotted names inside the module."""
    for node in module.tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for function in inside:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                yield prefix + function.name, function


def equation_table() -> list[tuple[str, str]]:
    """(equation or section, dotted name of code) of every row of ARCHITECTURE.md's table."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## From equation to function")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    return [(row[0].strip(), name) for row in rows for name in re.findall(r"`([\w.]+)`", row[2])]


def test_the_equation_table_names_code_that_exists():
    for equation, name in equation_table():
        parts = name.split(".")
        depth = max(n for n in range(1, len(parts) + 1) if is_module(parts[:n]))
        thing = importlib.import_module(".".join(parts[:depth]))
        for part in parts[depth:]:
            thing = inspect.getattr_static(thing, part, None)
        assert thing is not None, f"{equation}: {name} does not exist"


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_equation_table_lists_every_function_with_equation():
    listed = {name for _, name in equation_table()}
    for module in modules("snapfusion"):
        if module.name in METHOD:
            assert not ({f"{module.name}.{name}" for name, _ in public_functions(module)} - listed)


def test_commands_import_their_machinery_when_they_run():
    verbs = ", ".join(sorted(f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py")))
    assert modules_after(f"import {verbs}") & HEAVY == set()


def test_what_rays_controller_imports_is_light():
    assert modules_after("import jobs.training.report_queue, jobs.training.settings") & HEAVY == set()


@pytest.mark.parametrize("verb", ["distill_steps", "train_robust", "generate_pairs", "run_pipeline"])
def test_a_dry_run_loads_no_torch_and_no_ray(verb, tmp_path):
    dry_run = f"import jobs.{verb}; jobs.{verb}.main(['--dry-run', '--out', '{tmp_path}/run'])"
    assert modules_after(dry_run) & {"torch", "ray", "diffusers", "transformers"} == set()

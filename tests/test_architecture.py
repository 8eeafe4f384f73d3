"""Which way the arrows point, and what the files that ship may import."""

import ast
import sys
from pathlib import Path


RELATIVE = ("mpnet", "deberta", "deberta_v2")
PACKAGE = Path(__file__).parents[1] / "lsg_converter"
BELOW = {
    "__main__": {"cli", "tune_cli"},
    "tune_cli": {"cli", "options", "tune"},
    "tune": {"families", "companions", "conversion", "modeling", "options", "source", "verify"},
    "cli": {"conversion", "summary", "report", "options", "version"},
    "conversion": {
        *("families", "surgery", "source", "target", "companions", "verify", "export", "report", "card", "hub"),
        "options",
    },
    "hub": {"options"},
    "summary": {"card", "modeling", "report", "verify"},
    "card": {"report"},
    "report": {"verify", "version", "options"},
    "export": {"families", "options", "source", "verify"},
    "verify": {"source", "weights", "families", "options", "modeling"},
    "lsg_sentence": set(),
    "companions": {"source", "weights"},
    "target": {"companions", "report", "source", "weights", "families", "options"},
    "source": {"families", "surgery", "weights", "options"},
    "weights": {"options"},
    "families": {"options", "modeling"},
    "surgery": {"modeling"},
    "layers": {"modeling"},
    "interface": {"modeling"},
    "options": set(),
    "version": set(),
    "__init__": {"conversion", "interface", "modeling", "report", "version", "options"},
    "modeling/lsg_layout": set(),
    "modeling/lsg_sparsity": {"lsg_layout", "lsg_triton"},
    "modeling/lsg_cpu": {"lsg_bias", "lsg_layout"},
    "modeling/lsg_bias": set(),
    "modeling/lsg_triton_kernels": set(),
    "modeling/lsg_triton": {"lsg_bias", "lsg_layout", "lsg_triton_kernels"},
    "modeling/lsg_attention": {"lsg_bias", "lsg_cpu", "lsg_triton", "lsg_layout", "lsg_sparsity"},
    "modeling/lsg_config": {"lsg_attention", "lsg_layout", "lsg_sparsity"},
    "modeling/lsg_packing": {"lsg_cpu"},
    "modeling/lsg_classes": set(),
    "modeling/lsg_step": {"lsg_attention", "lsg_layout", "lsg_sparsity"},
    "modeling/lsg_text": {"lsg_attention", "lsg_layout", "lsg_sparsity", "lsg_step"},
    "modeling/lsg_forward": {"lsg_attention", "lsg_layout", "lsg_step", "lsg_text"},
    "modeling/lsg_generation": {"lsg_packing", "lsg_sparsity", "lsg_step"},
    "modeling/lsg_modules": {"lsg_attention", "lsg_bias", "lsg_config", "lsg_generation", "lsg_packing"},
    "modeling/lsg_modeling": {
        "lsg_attention",
        "lsg_classes",
        "lsg_config",
        "lsg_generation",
        "lsg_layout",
        "lsg_modules",
        "lsg_packing",
    },
    "modeling/lsg_disentangled": {
        *("lsg_bias", "lsg_config", "lsg_layout", "lsg_modeling", "lsg_modules", "lsg_packing"),
    },
    "modeling/lsg_handed": {"lsg_classes", "lsg_modeling", "lsg_modules"},
    "modeling/lsg_seq2seq": {
        *("lsg_classes", "lsg_config", "lsg_generation", "lsg_modeling", "lsg_modules", "lsg_packing"),
    },
    "modeling/lsg_t5": {"lsg_classes", "lsg_modules", "lsg_seq2seq"},
    "modeling/lsg_encoder_decoder": {
        *("lsg_classes", "lsg_config"),
        *(path.stem for path in (PACKAGE / "modeling").glob("modeling_lsg_*.py")),
    },
}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The siblings and the packages that a file imports."""
    siblings, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1
            if node.module is None:
                siblings |= {"__init__" if alias.name.startswith("__") else alias.name for alias in node.names}
            else:
                siblings.add(node.module.split(".")[0])
    return siblings, packages


def test_arrows():
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name.startswith("modeling/modeling_lsg_"):
            allowed = {"lsg_bias", "lsg_classes", "lsg_config", "lsg_modeling", "lsg_modules", "lsg_seq2seq"}
            allowed |= {"lsg_disentangled", "lsg_handed", "lsg_layout", "lsg_t5"}
        elif name == "modeling/__init__":
            allowed = set()
        else:
            allowed = BELOW[name]
        assert imports(path)[0] <= allowed, name


def test_what_ships_imports_torch_and_transformers_alone():
    for path in (PACKAGE / "modeling").glob("*.py"):
        siblings, packages = imports(path)
        optional = {"triton"} if path.stem == "lsg_triton_kernels" else set()
        assert packages - set(sys.stdlib_module_names) <= {"torch", "transformers"} | optional, path
        text = path.read_text()
        assert "from . import" not in text and "from __future__" not in text
        assert all((path.parent / f"{name}.py").exists() for name in siblings)


def test_a_family_states_facts():
    relative = {f"modeling_lsg_{name}" for name in RELATIVE}  # which also say where their biases come from
    for path in (PACKAGE / "modeling").glob("modeling_lsg_*.py"):
        assert len(path.read_text().splitlines()) < (80 if path.stem in relative else 30), path


def test_only_the_command_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        prints = [node for node in calls if ast.unparse(node.func).split(".")[-1] == "print"]
        assert not prints or path.name == "cli.py"

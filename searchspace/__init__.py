"""Architecture and search-space languages: YAML in, frozen typed specs out. Knows neither torch nor Ray."""

from searchspace.arch import ArchSpec, BlockSpec, LevelSpec
from searchspace.choices import Chooser, Decision, FixedChooser, RandomChooser
from searchspace.errors import CausalityError, ConstraintError, SpecError
from searchspace.files import load_arch, load_space
from searchspace.plain import key
from searchspace.plugin_loading import Plugin, load_plugin
from searchspace.space import Candidate, SpaceSize, SpaceSpec
from searchspace.tables import table

__all__ = [
    "ArchSpec",
    "BlockSpec",
    "Candidate",
    "CausalityError",
    "Chooser",
    "ConstraintError",
    "Decision",
    "FixedChooser",
    "LevelSpec",
    "Plugin",
    "RandomChooser",
    "SpaceSize",
    "SpaceSpec",
    "SpecError",
    "key",
    "load_arch",
    "load_plugin",
    "load_space",
    "table",
]

"""Puts configs/ into the wheel, as mcibi_d2/configs; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the config files; an editable installation has those of the checkout."""

    def _configs(self) -> list[tuple[str, str]]:
        target = Path(self.build_lib, "mcibi_d2")
        return [(str(path), str(target / path)) for path in sorted(Path("configs").rglob("*.yaml"))]

    def run(self):
        """Build the package."""
        super().run()
        for source, target in [] if self.editable_mode else self._configs():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_source_files(self):
        """What a source distribution must hold."""
        return [*super().get_source_files(), *(source for source, _ in self._configs())]

    def get_outputs(self, include_bytecode=True):
        """What was built."""
        targets = [] if self.editable_mode else [target for _, target in self._configs()]
        return [*super().get_outputs(include_bytecode), *targets]


setup(cmdclass={"build_py": BuildWithConfigs})

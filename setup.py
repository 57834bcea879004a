"""Builds the packages, without the scripts of the experiment in dni/: those run in a clone of the repository."""

from setuptools import setup
from setuptools.command.build_py import build_py

SCRIPTS = {"cifar_cnn_dni", "cifar_dgl", "delayed_recall", "dni_backbone"}


class Library(build_py):
    def find_package_modules(self, package, folder):
        return [found for found in super().find_package_modules(package, folder) if found[1] not in SCRIPTS]


setup(cmdclass={"build_py": Library})

"""Small modules with the interface of packages that users install, for tests where the packages are not."""

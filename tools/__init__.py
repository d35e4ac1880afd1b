"""Tools for those who work on dfkernels; not part of the package."""

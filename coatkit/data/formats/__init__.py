"""Readers of formats that others write; `coatkit.data.readers` names them, and they are imported when one is opened."""

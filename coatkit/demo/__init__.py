"""A page to try a run in the browser; `coatkit demo`. gradio comes with the extra `demo`."""

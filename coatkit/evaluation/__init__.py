"""What a run answers to rows it was not trained on, and how good that is."""

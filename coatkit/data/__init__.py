"""From JSONL rows to prepared batches: rows, audio, the batch plan, and the steps a trainer takes."""

"""The dataset: read with line numbers, examined, rendered with the chat template, split, digested. No torch."""

"""The dataset: read with line numbers, validated, split, rendered with the chat template, fingerprinted. No torch."""

"""What knows nothing of models or runs: files, processes, memory, versions. Imports no other part."""

"""What this machine is: host, GPU. The only importer of psutil and pynvml."""

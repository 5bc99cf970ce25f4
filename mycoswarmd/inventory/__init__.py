"""What this machine is: host, GPU. The only importer of psutil, and of the NVIDIA driver's library."""

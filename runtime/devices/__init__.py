"""Whose memory and kernels a drawing uses: the host's, or a GPU's."""

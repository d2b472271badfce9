"""Rounds that do not wait for every client (FedBuff, Nguyen et al., arXiv:2106.06639)."""

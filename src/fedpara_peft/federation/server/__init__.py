"""The server's half of a round: sampling, channel, admission, mean, privacy."""

"""Real Redis servers on this machine, without Docker: single, Cluster, Sentinel, TLS with users."""

"""The online store in Redis: single, Sentinel or Cluster. Nothing outside this folder loads the client."""

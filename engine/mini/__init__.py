"""The shipped model `mini`: its procedural world, its prompts, and how it was trained."""

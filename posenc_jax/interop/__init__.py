"""Models of other projects: reading their files, and writing this project's models for them."""

"""Applications that come with the product; each is also an example of how to write one."""

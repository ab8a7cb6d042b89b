"""Where payloads live: device arena, host pool, Zarr store, journal, and the cache over them."""

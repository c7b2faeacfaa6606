"""Methods that bend the next-token distribution, one file each, written against `rows`."""

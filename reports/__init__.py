"""Reading what runs left in their directories, and telling it: tables beside the published ones, and figures."""

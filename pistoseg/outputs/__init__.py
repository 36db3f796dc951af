"""What people look at: pictures of masks, tables of scores."""

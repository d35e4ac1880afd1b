"""Pages and figures for readers: one HTML file each, light and dark. Imported only where one is
made, since it needs the extra `report`."""

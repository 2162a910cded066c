"""Objects and folders on local disks and object stores."""

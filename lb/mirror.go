package lb

// MirroredClusters are the other clusters, by ID, whose endpoints of the service shall be EndpointSlices in the own one too: those that share theirs, if the own declaration is global and its
// annotation says so, or it is headless and none says otherwise, since names lead to EndpointSlices.
func MirroredClusters(view ServiceView) []string {
	local := view.local()
	if local == nil || !local.Global {
		return nil
	}
	if says := local.Annotations[AnnotationSyncSlices]; says != "true" && (!local.Headless || says == "false") {
		return nil
	}
	var clusters []string
	for _, s := range byID(view.takingPart()) {
		if s.Cluster != view.Self && s.Shared {
			clusters = append(clusters, s.Cluster)
		}
	}
	return clusters
}

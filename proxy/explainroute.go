package proxy

import (
	"kerberos/registry"
)

// explainRoute adds to e why the request leads to that service.
func (x *exchange) explainRoute(e *registry.Explanation, name string) {
	if name != "" {
		e.Route = &registry.RouteExplanation{Service: name}
	}
}

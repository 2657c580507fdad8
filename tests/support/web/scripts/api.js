// Stands in for the page's module of this name when the scripts in web/ are checked.
/**
 * @type {{ fetchApi: (route: string, options?: RequestInit) => Promise<Response>, apiURL: (route: string) => string,
 *   addEventListener: (type: string, listener: (event: any) => void) => void,
 *   removeEventListener: (type: string, listener: (event: any) => void) => void }}
 */
export const api = /** @type {any} */ (undefined)
